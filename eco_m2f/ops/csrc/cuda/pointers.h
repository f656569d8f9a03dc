// The kernels' data: contiguous tensors on the current device. Wide means float, or double for Storage::kDouble.
#pragma once

namespace eco_m2f {

enum class Storage { kDouble, kFloat, kHalf, kBFloat16 };

struct ForwardPointers {
  const void* value;
  const void* locations;  // wide
  const void* weights;
  void* output;
};

struct BackwardPointers {
  const void* grad_output;
  const void* value;
  const void* locations;  // wide
  const void* weights;
  void* grad_value;      // wide, zeroed
  void* grad_locations;  // wide
  void* grad_weights;
};

}  // namespace eco_m2f
