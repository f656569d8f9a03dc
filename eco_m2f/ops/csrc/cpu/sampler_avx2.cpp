// The sampler for AVX2.
#include "sampler.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")

#define ECO_ISA avx2
#define ECO_VECTOR_BYTES 32

namespace eco_m2f {
namespace avx2 {

static inline __m256 multiply_add(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
static inline __m256d multiply_add(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }

}  // namespace avx2
}  // namespace eco_m2f

#include "sampler_kernel.h"

#pragma GCC pop_options

namespace eco_m2f {

template <>
Sampler<float> avx2_sampler() {
  return avx2::sampler<float>("avx2");
}

template <>
Sampler<double> avx2_sampler() {
  return avx2::sampler<double>("avx2");
}

}  // namespace eco_m2f

#endif
