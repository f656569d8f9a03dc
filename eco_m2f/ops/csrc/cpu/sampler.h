// The interface of the vectorised samplers, and the choice among them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "staging.h"

namespace eco_m2f {

// The size and place of the level of each sample of a head. Padded to whole vectors with samples that are outside.
template <typename T>
struct SampleTable {
  std::vector<T> width, height;
  std::vector<T> size;  // width and height alternate
  std::vector<int32_t> level, origin, row_cells, outside;

  SampleTable(const Problem& p, const StagedLayout& layout, int64_t vector_lanes) {
    const int64_t samples = p.levels * p.points, padded = (samples + vector_lanes - 1) / vector_lanes * vector_lanes;
    for (int64_t i = 0; i < padded; ++i) {
      const int64_t level = i < samples ? i / p.points : 0;
      width.push_back(i < samples ? T(p.level[level].width) : T(-1));  // no x is >= -1 and < -1
      height.push_back(T(p.level[level].height));
      size.push_back(T(p.level[level].width)), size.push_back(T(p.level[level].height));
      this->level.push_back(int32_t(level));
      origin.push_back(int32_t(layout.origin[level]));
      row_cells.push_back(int32_t(layout.row_cells[level]));
      outside.push_back(int32_t(layout.outside(p, level)));
    }
  }
};

// The work of one head of one image. Pointers are at its first query.
template <typename T>
struct HeadTask {
  int64_t channels, samples;          // channels without padding; samples = levels * points
  int64_t query_rows, query_samples;  // from one query to the next: heads * channels, heads * samples
  int64_t staged_channels;            // channels with padding
  const SampleTable<T>* table;
  const T* map;              // staged
  const T* locations;        // fused: offsets in pixels
  const T* locations_end;    // of the whole tensor: a vector may read past its head, but not past this
  const T* weights;          // fused: logits
  const T* weights_end;      // as locations_end
  const T* reference;        // fused, like the next four
  int64_t reference_row;     // from one query to the next
  int64_t reference_levels;  // 1: the same point for all levels
  int64_t padded_samples;    // to whole vectors
  T* scratch;                // five times padded_samples, of this thread
  T* output;                 // forward
  const T* grad_output;      // backward, like all below
  T* grad_map;               // staged, added to
  T* grad_locations;         // fused: of the offsets
  T* grad_weights;           // fused: of the logits
};

// The kernels of one instruction set, for the queries [begin, end).
template <typename T>
struct Sampler {
  const char* name;
  int64_t lanes;         // of a vector
  int64_t max_channels;  // the portable kernels take more
  void (*forward)(const HeadTask<T>&, int64_t begin, int64_t end);
  void (*fused_forward)(const HeadTask<T>&, int64_t begin, int64_t end);
  void (*backward)(const HeadTask<T>&, int64_t begin, int64_t end);
  void (*fused_backward)(const HeadTask<T>&, int64_t begin, int64_t end);
};

template <typename T>
Sampler<T> avx512_sampler();
template <typename T>
Sampler<T> avx2_sampler();
template <typename T>
Sampler<T> baseline_sampler();  // only for float

// The best sampler that the processor runs, or that the limit allows. Null for the limit "portable", and for doubles if
// there is only the baseline.
template <typename T>
const Sampler<T>* choose_sampler(const std::string& limit);

}  // namespace eco_m2f
