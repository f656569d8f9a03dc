// The border between the tensors (ms_deform_attn.cpp, for a C++ compiler) and the kernels (launch.cu, for nvcc).
#pragma once

#include <cuda_runtime_api.h>

#include "call.h"
#include "pointers.h"

namespace eco_m2f {

// These enqueue on the stream, with 16-byte reads if pointers and channels allow them. They return null, or the
// quantity that is too large for the kernels. cudaGetLastError has the errors of the launch itself.
const char* launch_forward(const Problem& p, Storage storage, ForwardPointers pointers, cudaStream_t stream);
const char* launch_backward(const Problem& p, Storage storage, BackwardPointers pointers, cudaStream_t stream);

}  // namespace eco_m2f
