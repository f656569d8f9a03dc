// The kernels' data: contiguous tensors on the current device. Wide means float, or double for Storage::kDouble.
#pragma once

namespace eco_m2f {

// Fused: the wide reference points, and the elements from one image, query and level to the next (0: shared by all).
// Locations are then offsets; weights are logits, and wide.
struct Reference {
  const void* points = nullptr;
  int64_t image = 0, query = 0, level = 0;
};

enum class Storage { kDouble, kFloat, kHalf, kBFloat16 };

struct ForwardPointers {
  const void* value;
  const void* locations;  // wide
  const void* weights;
  void* output;
  Reference reference = {};
};

struct BackwardPointers {
  const void* grad_output;
  const void* value;
  const void* locations;  // wide
  const void* weights;
  void* grad_value;      // wide, zeroed
  void* grad_locations;  // wide
  void* grad_weights;
  Reference reference = {};
};

}  // namespace eco_m2f
