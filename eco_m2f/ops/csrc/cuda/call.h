// The host's arguments to the kernels: sizes, and how the work is cut. Without PyTorch and CUDA, so tests run anywhere.
//
// A unit is one query and head of one image. A launch covers several images (grid.y). A block works on consecutive
// units of one image. `lanes` threads share a unit; each reads 16 bytes of channels at a time. The block locates the
// points of its units once, `tile` samples per unit at a time, into shared memory.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace eco_m2f {

constexpr int64_t kMaxInt32 = 2147483647;
constexpr int kThreads = 96;        // of a block; 12 points and any number of lanes divide it
constexpr int kBlocks = 8;          // per multiprocessor; the compiler limits registers for this
constexpr int kStagedPoints = 288;  // of a block
constexpr int kMaxFusedSamples = kStagedPoints / (kThreads / 32);  // of a unit; the softmax needs all of them

struct Call {
  int64_t tokens;
  uint32_t units;  // of one image: queries * heads
  uint32_t heads, channels, points, samples;
  uint32_t lanes, tile;
  uint32_t row, row_bytes;  // from one token to the next: in elements (heads * channels), and in bytes of value
  uint32_t reference_query, reference_level;  // fused: from one reference point to the next, in elements
  int64_t reference_image;
  int32_t width[kMaxLevels], height[kMaxLevels], start[kMaxLevels];
};

struct Plan {
  Call call;
  const char* error;  // the quantity that is too large for the kernels, or null
  int64_t blocks;     // per image
  bool fixed;         // the kernel for 8 heads of 32 channels, 3 levels and 4 points fits
};

// vector: channels per read of a thread; fused: the samples of a unit must fit into one tile.
inline Plan make_plan(const Problem& p, int64_t vector, int64_t element_bytes, bool fused = false) {
  Plan plan{};
  const int64_t units = p.queries * p.heads, samples = p.levels * p.points, row = p.heads * p.channels;
  plan.error = p.tokens > kMaxInt32                  ? "more than 2^31 - 1 tokens"
               : units > kMaxInt32 - kThreads        ? "queries * heads of more than 2^31 - 97"
               : row * element_bytes > kMaxInt32     ? "a token of more than 2^31 - 1 bytes"
               : p.levels * p.points >= 1 << 24      ? "levels * points of 2^24 or more"
               : fused && samples > kMaxFusedSamples ? "levels * points of more than 96"
                                                     : nullptr;
  if (plan.error) return plan;
  int64_t lanes = 1;
  while (lanes < 32 && lanes * vector < p.channels) lanes *= 2;
  while (fused && kStagedPoints / (kThreads / lanes) < samples) lanes *= 2;
  const int64_t block_units = kThreads / lanes;
  const int64_t tile = samples < kStagedPoints / block_units ? samples : kStagedPoints / block_units;
  plan.fixed = p.heads == 8 && p.channels == 32 && p.levels == 3 && p.points == 4;
  plan.blocks = (units + block_units - 1) / block_units;
  Call& call = plan.call;
  call.tokens = p.tokens, call.units = uint32_t(units), call.heads = uint32_t(p.heads);
  call.channels = uint32_t(p.channels), call.points = uint32_t(p.points), call.samples = uint32_t(samples);
  call.lanes = uint32_t(lanes), call.tile = uint32_t(tile);
  call.row = uint32_t(row), call.row_bytes = uint32_t(row * element_bytes);
  for (int64_t i = 0; i < p.levels; ++i) {
    call.width[i] = int32_t(p.level[i].width), call.height[i] = int32_t(p.level[i].height);
    call.start[i] = int32_t(p.level[i].start);
  }
  return plan;
}

}  // namespace eco_m2f
