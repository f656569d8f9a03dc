// The sizes of one call, checked and flattened, for the CPU and CUDA kernels.
#pragma once

#include <cstdint>

namespace eco_m2f {

constexpr int kMaxLevels = 16;

// One level of the value map.
struct Level {
  int64_t height, width;
  int64_t start;  // index of its first token
};

// value [batch, tokens, heads, channels], locations [batch, queries, heads, levels, points, 2].
struct Problem {
  int64_t batch, tokens, heads, channels, queries, levels, points;
  Level level[kMaxLevels];
};

}  // namespace eco_m2f
