// Launches on a stream, without synchronisation or allocation, so graphs can capture the calls.
#include "launch.h"

#include "variants.cuh"

namespace eco_m2f {
namespace {

struct StreamStart {
  static constexpr int64_t kMaxImages = 65535;  // of grid.y
  cudaStream_t stream;

  template <typename Kernel, typename... Arguments>
  void operator()(Kernel kernel, int64_t blocks, int64_t images, Arguments... arguments) const {
    kernel<<<dim3(unsigned(blocks), unsigned(images)), kThreads, 0, stream>>>(arguments...);
  }
};

}  // namespace

const char* launch_forward(const Problem& p, Storage storage, ForwardPointers pointers, cudaStream_t stream) {
  return start_forward(p, storage, pointers, StreamStart{stream});
}

const char* launch_backward(const Problem& p, Storage storage, BackwardPointers pointers, cudaStream_t stream) {
  return start_backward(p, storage, pointers, StreamStart{stream});
}

}  // namespace eco_m2f
