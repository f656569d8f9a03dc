// A copy of one head's map, in which sampling needs no bounds check.
//
// In the tensor [tokens, heads, channels] the rows of one head lie heads*channels apart. For powers of two this leaves
// most of the cache unused. The copy is dense and has a border of zeros. Each level has one row above and two below,
// and one cell to the right of each row, which is also the cell left of the next row. A point that touches the map
// reads its four cells. A point outside reads the zeros below the map. So value, weights and gradients of cells outside
// the map are right without a mask. Channels are padded to whole vectors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../problem.h"

namespace eco_m2f {

struct StagedLayout {
  int64_t channels;                // per cell, with padding
  int64_t cells = 0;               // of one head
  std::vector<int64_t> origin;     // per level: the cell of pixel (0, 0)
  std::vector<int64_t> row_cells;  // per level: cells from one row to the next

  StagedLayout(const Problem& p, int64_t vector_lanes) : channels(vector_lanes) {
    while (channels < p.channels) channels *= 2;  // a kernel exists for 1, 2, 4 and 8 vectors per cell
    for (int64_t i = 0; i < p.levels; ++i) {
      row_cells.push_back(p.level[i].width + 1);
      origin.push_back(cells + row_cells[i] + 1);
      cells += row_cells[i] * (p.level[i].height + 3) + 2;
    }
  }

  // A zero cell whose right, lower and lower right neighbours are zeros too.
  int64_t outside(const Problem& p, int64_t level) const {
    return origin[level] + row_cells[level] * p.level[level].height;
  }
};

// Fills cells [begin, end) of the copy, of type T, from `value`, the first row of this head and image.
template <typename S, typename T>
void stage_cells(const Problem& p, const StagedLayout& layout, const S* value, T* map, int64_t begin, int64_t end) {
  std::fill(map + begin * layout.channels, map + end * layout.channels, T(0));
  const int64_t row_stride = p.heads * p.channels;
  for (int64_t i = 0; i < p.levels; ++i) {
    for (int64_t y = 0; y < p.level[i].height; ++y) {
      const int64_t first = layout.origin[i] + y * layout.row_cells[i];
      const int64_t from = std::max(begin, first), to = std::min(end, first + p.level[i].width);
      const S* source = value + (p.level[i].start + y * p.level[i].width + from - first) * row_stride;
      for (int64_t cell = from; cell < to; ++cell, source += row_stride) {
        T* target = map + cell * layout.channels;
        for (int64_t c = 0; c < p.channels; ++c) target[c] = T(source[c]);
      }
    }
  }
}

// The reverse: sums `copies` maps, each of layout.cells cells, into the rows of the tokens [begin, end).
template <typename S, typename T>
void unstage_tokens(const Problem& p, const StagedLayout& layout, const T* maps, int64_t copies, S* value,
                    int64_t begin, int64_t end) {
  const int64_t row_stride = p.heads * p.channels, map_size = layout.cells * layout.channels;
  for (int64_t i = 0; i < p.levels; ++i) {
    const Level& level = p.level[i];
    const int64_t from = std::max(begin, level.start), to = std::min(end, level.start + level.height * level.width);
    for (int64_t token = from; token < to; ++token) {
      const int64_t y = (token - level.start) / level.width, x = (token - level.start) % level.width;
      const T* cell = maps + (layout.origin[i] + y * layout.row_cells[i] + x) * layout.channels;
      S* target = value + token * row_stride;
      for (int64_t c = 0; c < p.channels; ++c) {
        T sum = cell[c];
        for (int64_t k = 1; k < copies; ++k) sum += cell[k * map_size + c];
        target[c] = S(sum);
      }
    }
  }
}

}  // namespace eco_m2f
