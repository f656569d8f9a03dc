// The place of one sampling point: the four cells around it and their bilinear weights.
// Built without contraction of products and sums (-ffp-contract=off): all backends must choose the same cell.
#pragma once

#include <cmath>
#include <cstdint>

#include "../problem.h"

namespace eco_m2f {

// How the kernels treat a point.
enum class Place { kInside, kOutside, kNotFinite };

// Corners are ordered (y0, x0), (y0, x1), (y1, x0), (y1, x1). Only valid corners, inside the map, count. The mask is
// explicit, since a valid corner can have weight 0 but a slope.
template <typename T>
struct Corners {
  bool valid[4];
  int64_t token[4];
  T weight[4], dx[4], dy[4];
};

// x, y: in [0, 1], relative to the level. Fills the corners if the point touches the map.
template <typename T>
inline Place locate(const Level& level, T x, T y, Corners<T>& corners) {
  const T column = x * T(level.width) - T(0.5), row = y * T(level.height) - T(0.5);
  if (!std::isfinite(column) || !std::isfinite(row)) return Place::kNotFinite;
  if (!(column >= -1 && column < T(level.width) && row >= -1 && row < T(level.height))) return Place::kOutside;
  const T column0 = std::floor(column), row0 = std::floor(row);
  const T fx = column - column0, fy = row - row0;
  const int64_t x0 = int64_t(column0), y0 = int64_t(row0);
  for (int i = 0; i < 4; ++i) {
    const int64_t xi = x0 + (i & 1), yi = y0 + (i >> 1);
    const T wx = i & 1 ? fx : 1 - fx, wy = i >> 1 ? fy : 1 - fy;
    corners.valid[i] = xi >= 0 && xi < level.width && yi >= 0 && yi < level.height;
    corners.token[i] = level.start + yi * level.width + xi;
    corners.weight[i] = wx * wy;
    corners.dx[i] = i & 1 ? wy : -wy;
    corners.dy[i] = i >> 1 ? wx : -wx;
  }
  return Place::kInside;
}

}  // namespace eco_m2f
