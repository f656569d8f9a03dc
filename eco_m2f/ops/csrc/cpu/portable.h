// Kernels in plain C++, for any number of channels, levels and points. Sums are in T = float or double; S is the type
// of value. They read value in place, which is better for few queries on large maps.
#pragma once

#include <limits>

#include "point.h"

namespace eco_m2f {

template <typename S, typename T>
struct ForwardArguments {
  const S* value;
  const T* locations;
  const T* weights;
  T* output;
};

// One query: all heads.
template <typename S, typename T>
void portable_forward_query(const Problem& p, const ForwardArguments<S, T>& a, int64_t image, int64_t query) {
  const int64_t row_stride = p.heads * p.channels, samples = p.levels * p.points;
  const int64_t first = (image * p.queries + query) * p.heads;
  for (int64_t head = 0; head < p.heads; ++head) {
    const S* value = a.value + (image * p.tokens * p.heads + head) * p.channels;
    const T* location = a.locations + (first + head) * samples * 2;
    const T* weight = a.weights + (first + head) * samples;
    T* sum = a.output + (first + head) * p.channels;
    for (int64_t c = 0; c < p.channels; ++c) sum[c] = 0;
    for (int64_t i = 0; i < samples; ++i) {
      Corners<T> corners;
      const Place place = locate(p.level[i / p.points], location[2 * i], location[2 * i + 1], corners);
      if (place == Place::kNotFinite || !std::isfinite(weight[i])) {
        for (int64_t c = 0; c < p.channels; ++c) sum[c] = std::numeric_limits<T>::quiet_NaN();
      }
      for (int k = 0; place == Place::kInside && k < 4; ++k) {
        if (!corners.valid[k]) continue;
        const S* row = value + corners.token[k] * row_stride;
        const T scale = corners.weight[k] * weight[i];
        for (int64_t c = 0; c < p.channels; ++c) sum[c] += scale * T(row[c]);
      }
    }
  }
}

template <typename S, typename T>
struct BackwardArguments {
  const T* grad_output;
  const S* value;
  const T* locations;
  const T* weights;
  T* grad_value;  // zeroed
  T* grad_locations;
  T* grad_weights;
};

// All queries of one head of one image; so no two threads add to the same row of grad_value.
template <typename S, typename T>
void portable_backward_head(const Problem& p, const BackwardArguments<S, T>& a, int64_t image, int64_t head) {
  const int64_t row_stride = p.heads * p.channels, samples = p.levels * p.points;
  const S* value = a.value + (image * p.tokens * p.heads + head) * p.channels;
  T* grad_value = a.grad_value + (image * p.tokens * p.heads + head) * p.channels;
  for (int64_t query = 0; query < p.queries; ++query) {
    const int64_t unit = (image * p.queries + query) * p.heads + head;
    const T* grad = a.grad_output + unit * p.channels;
    T poison = 0;  // becomes NaN if the gradient is not finite
    for (int64_t c = 0; c < p.channels; ++c) poison += grad[c] - grad[c];
    for (int64_t i = 0; i < samples; ++i) {
      const Level& level = p.level[i / p.points];
      const T* location = a.locations + (unit * samples + i) * 2;
      T* grad_location = a.grad_locations + (unit * samples + i) * 2;
      const T weight = a.weights[unit * samples + i];
      Corners<T> corners;
      const Place place = locate(level, location[0], location[1], corners);
      const T none = place == Place::kNotFinite ? std::numeric_limits<T>::quiet_NaN() : poison;
      T along = none, dx = none, dy = none;
      for (int k = 0; place == Place::kInside && k < 4; ++k) {
        if (!corners.valid[k]) continue;
        const S* row = value + corners.token[k] * row_stride;
        T* grad_row = grad_value + corners.token[k] * row_stride;
        const T scale = corners.weight[k] * weight;
        T dot = 0;
        for (int64_t c = 0; c < p.channels; ++c) dot += grad[c] * T(row[c]);
        for (int64_t c = 0; c < p.channels; ++c) grad_row[c] += scale * grad[c];
        along += corners.weight[k] * dot, dx += corners.dx[k] * dot, dy += corners.dy[k] * dot;
      }
      a.grad_weights[unit * samples + i] = along;
      grad_location[0] = dx * weight * T(level.width);
      grad_location[1] = dy * weight * T(level.height);
    }
  }
}

}  // namespace eco_m2f
