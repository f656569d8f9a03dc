// The sampler for the compiler's own target: SSE2 on x86-64, NEON on 64-bit ARM. Vectors of two doubles are too short.
#include "sampler.h"

#define ECO_ISA baseline
#define ECO_VECTOR_BYTES 16

namespace eco_m2f {
namespace baseline {

template <typename V>
static inline V multiply_add(V a, V b, V c) {
  return a * b + c;
}

}  // namespace baseline
}  // namespace eco_m2f

#include "sampler_kernel.h"

namespace eco_m2f {

template <>
Sampler<float> baseline_sampler() {
  return baseline::sampler<float>("baseline");
}

}  // namespace eco_m2f
