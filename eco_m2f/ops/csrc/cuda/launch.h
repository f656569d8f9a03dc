// Between the tensors (ms_deform_attn.cpp, a C++ compiler's work) and the kernels (launch.cu, nvcc's).
#pragma once

#include <cuda_runtime_api.h>

#include "call.h"
#include "pointers.h"

namespace eco_m2f {

// Enqueue on the stream. 16-byte reads are used where the pointers and the number of channels allow them. Return null,
// or what is too large for the kernels. Errors of the launch itself stay with cudaGetLastError.
const char* launch_forward(const Problem& p, Storage storage, ForwardPointers pointers, cudaStream_t stream);
const char* launch_backward(const Problem& p, Storage storage, BackwardPointers pointers, cudaStream_t stream);

}  // namespace eco_m2f
