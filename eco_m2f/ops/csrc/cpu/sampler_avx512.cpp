// The sampler for AVX512.
#include "sampler.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")

#define ECO_ISA avx512
#define ECO_VECTOR_BYTES 64

namespace eco_m2f {
namespace avx512 {

static inline __m512 multiply_add(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
static inline __m512d multiply_add(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }

}  // namespace avx512
}  // namespace eco_m2f

#include "sampler_kernel.h"

#pragma GCC pop_options

namespace eco_m2f {

template <>
Sampler<float> avx512_sampler() {
  return avx512::sampler<float>("avx512");
}

template <>
Sampler<double> avx512_sampler() {
  return avx512::sampler<double>("avx512");
}

}  // namespace eco_m2f

#endif
