// Chooses the sampler once per call: a few comparisons.
#include "sampler.h"

namespace eco_m2f {

template <typename T>
const Sampler<T>* choose_sampler(const std::string& limit) {
  if (limit == "portable") return nullptr;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  static const Sampler<T> avx512 = avx512_sampler<T>(), avx2 = avx2_sampler<T>();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (has_avx512 && (limit.empty() || limit == "avx512")) return &avx512;
  if (has_avx2 && limit != "baseline") return &avx2;
#endif
  if constexpr (sizeof(T) == sizeof(float)) {
    static const Sampler<T> baseline = baseline_sampler<T>();
    return &baseline;
  }
  return nullptr;
}

template const Sampler<float>* choose_sampler(const std::string&);
template const Sampler<double>* choose_sampler(const std::string&);

}  // namespace eco_m2f
