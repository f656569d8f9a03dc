// The CUDA kernels. The source also compiles for the host, where tests run it thread by thread. CUDA's own names
// (threadIdx, __shared__, __syncthreads, __shfl_xor_sync, ...) must then be defined before this file is included.
//
// Forward, per block: (1) one thread locates each point. It writes the weights of the four corners, with the attention
// weight, and their tokens to shared memory. (2) The lanes of each unit read 16 bytes of each corner and sum.
// Backward: (1) as above. (2) The lanes read the corners and add to the gradient of value. They write the four dot
// products <value at the corner, gradient> of each point to shared memory, over its weights. (3) One thread per point
// makes its gradients from them. Sums are in float, or in double for double. reference.py has the rules for borders and
// for values that are not finite.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <type_traits>

#include "call.h"

namespace eco_m2f {

template <typename S>
struct Sum {
  using Type = float;
};
template <>
struct Sum<double> {
  using Type = double;
};

// A variant of a kernel. S: the type of value. kVector: channels per read, 16 bytes of them or 1. kFixed: 8 heads of 32
// channels, 3 levels and 4 points, known at compile time. kFused: from offsets and logits.
template <typename S_, int kVector_, bool kFixed_, bool kFused_>
struct Variant {
  using S = S_;
  using T = typename Sum<S>::Type;
  static constexpr int kVector = kVector_;
  static constexpr bool kFixed = kFixed_, kFused = kFused_;
  using W = std::conditional_t<kFused, T, S>;  // of the weights or logits
};

template <typename S, int kCount>
struct alignas(sizeof(S) * kCount) Pack {
  S item[kCount];
};

template <typename T>
struct alignas(16) Weights {
  T corner[4];  // (y0, x0), (y0, x1), (y1, x0), (y1, x1)
};

struct alignas(16) Tokens {
  int32_t corner[4];  // within the image; the first is -1 where the point touches no cell
};

// The same pointer, computed here; else the compiler would compute it again at each use in a branch.
template <typename P>
__device__ inline P* settled(P* pointer) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// A thread's view of the call.
template <typename V>
struct Shape {
  uint32_t lanes, samples, points, tile, channels, heads;

  __device__ explicit Shape(const Call& call)
      : lanes(V::kFixed ? 32 / V::kVector : call.lanes),
        samples(V::kFixed ? 12 : call.samples),
        points(V::kFixed ? 4 : call.points),
        tile(V::kFixed ? 12 : call.tile),
        channels(V::kFixed ? 32 : call.channels),
        heads(V::kFixed ? 8 : call.heads) {}

  __device__ uint32_t block_units() const { return kThreads / lanes; }
};

__device__ inline float pixel(float x, int32_t size) { return __fadd_rn(__fmul_rn(x, float(size)), -0.5f); }
__device__ inline double pixel(double x, int32_t size) { return __dadd_rn(__dmul_rn(x, double(size)), -0.5); }

// The place of a point. It is outside if it touches no cell, or a coordinate is not finite.
template <typename T>
struct Place {
  T fx, fy, poison;  // poison: 0, or NaN if a coordinate is not finite
  int32_t x0, y0;
  bool inside;

  __device__ Place(Pack<T, 2> location, int32_t width, int32_t height) {
    const T x = pixel(location.item[0], width), y = pixel(location.item[1], height);
    inside = x >= T(-1) && x < T(width) && y >= T(-1) && y < T(height);
    const T left = floor(inside ? x : T(0)), above = floor(inside ? y : T(0));
    x0 = int32_t(left), y0 = int32_t(above);
    fx = x - left, fy = y - above;
    poison = x * T(0) + y * T(0);
  }
};

// Step 1 for one point. A corner outside the map gets the token of the nearest cell, which the point touches too.
template <typename T>
__device__ void stage_point(const Call& call, uint32_t level, Pack<T, 2> location, T attention, Weights<T>& weights,
                            Tokens& tokens) {
  const int32_t width = call.width[level], height = call.height[level];
  const Place<T> at(location, width, height);
  const bool left = at.inside && at.x0 >= 0, right = at.inside && at.x0 + 1 < width;
  const bool above = at.inside && at.y0 >= 0, below = at.inside && at.y0 + 1 < height;
  const T scale = attention + at.poison;
  const T wx0 = left ? 1 - at.fx : T(0), wx1 = right ? at.fx : T(0);
  const T wy0 = scale * (above ? 1 - at.fy : T(0)), wy1 = scale * (below ? at.fy : T(0));
  weights = {{wy0 * wx0, wy0 * wx1, wy1 * wx0, wy1 * wx1}};
  const int32_t upper = call.start[level] + (above ? at.y0 : 0) * width;
  const int32_t lower = upper + (above && below ? width : 0);
  const int32_t x0 = left ? at.x0 : 0, x1 = right ? at.x0 + 1 : x0;
  tokens = {{at.inside ? upper + x0 : -1, upper + x1, lower + x0, lower + x1}};
}

// Index of the first point of the block's first unit.
template <typename V>
__device__ int64_t first_point(const Call& call, const Shape<V>& shape) {
  return (int64_t(blockIdx.y) * call.units + blockIdx.x * shape.block_units()) * shape.samples;
}

// The block's i-th point, i = threadIdx.x plus a multiple of kThreads, in a tile of samples [begin, begin + count) per
// unit. Missing units of the last block get the points of the last unit; their lanes drop the results.
template <typename V>
struct Point {
  uint32_t unit, sample, level;  // unit: of the block
  uint32_t offset;               // from the first point of the block's first unit

  __device__ Point(const Call& call, const Shape<V>& shape, uint32_t i, uint32_t begin, uint32_t count) {
    const uint32_t units = min(call.units - blockIdx.x * shape.block_units(), shape.block_units());
    if (V::kFixed) {  // the compiler sees that the level does not depend on the round
      static_assert(kThreads % 12 == 0, "a thread must meet the same sample in each round");
      unit = min(i / 12, units - 1), sample = threadIdx.x % 12, level = sample / 4, offset = min(i, units * 12 - 1);
    } else {
      unit = min(i / count, units - 1), sample = begin + i % count, level = sample / shape.points;
      offset = unit * shape.samples + sample;
    }
  }
};

__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float exponential(float x) {
#ifdef __CUDA_ARCH__
  return __expf(x);  // its relative error grows with -x, while exp(x) shrinks
#else
  return exp(x);
#endif
}

// The sample's softmax weight over a unit's logits.
template <typename T>
__device__ T softmax_weight(const T* logits, uint32_t samples, uint32_t sample) {
  T top = logits[0], sum = 0;
#pragma unroll
  for (uint32_t i = 1; i < samples; ++i) top = logits[i] > top ? logits[i] : top;
#pragma unroll
  for (uint32_t i = 0; i < samples; ++i) sum += exponential(logits[i] - top);
  return exponential(logits[sample] - top) / sum;
}

// The addresses of a block's points, from its first unit on.
template <typename V>
struct Source {
  using T = typename V::T;
  const Pack<T, 2>* locations;
  const typename V::W* weights;
  const T* reference;  // fused: of this image

  // Location and attention weight of a point.
  __device__ void load(const Call& call, const Shape<V>& shape, const Point<V>& at, Pack<T, 2>& location,
                       T& weight) const {
    location = locations[at.offset];
    if constexpr (V::kFused) {
      const uint32_t query = (blockIdx.x * shape.block_units() + at.unit) / shape.heads;
      const T* point = reference + int64_t(query) * call.reference_query + at.level * call.reference_level;
      location = {{point[0] + location.item[0] / T(call.width[at.level]),
                   point[1] + location.item[1] / T(call.height[at.level])}};
      weight = softmax_weight<T>(weights + at.unit * shape.samples, shape.samples, at.sample);
    } else {
      weight = weights[at.offset];
    }
  }
};

// Step 1: samples [begin, begin + count) of each of the block's units, in the order [unit, sample].
template <typename V>
__device__ void stage(const Call& call, const Shape<V>& shape, uint32_t begin, uint32_t count, const Source<V>& source,
                      Weights<typename V::T>* staged_weights, Tokens* staged_tokens) {
  using T = typename V::T;
  const uint32_t total = shape.block_units() * count;
#pragma unroll
  for (uint32_t round = 0; round < (total + kThreads - 1) / kThreads; ++round) {  // a constant number where kFixed
    const uint32_t i = round * kThreads + threadIdx.x;
    if (i >= total) break;
    const Point<V> at(call, shape, i, begin, count);
    Pack<T, 2> location;
    T weight;
    source.load(call, shape, at, location, weight);
    stage_point<T>(call, at.level, location, weight, staged_weights[i], staged_tokens[i]);
  }
}

// kCount channels at `bytes` after an address. They are zero until read; at(i) is one of them.
template <typename S, int kCount>
struct Channels {
  Pack<S, kCount> pack = {};
  __device__ void read(const S* base, uint64_t bytes) {
    pack = *reinterpret_cast<const Pack<S, kCount>*>(reinterpret_cast<const char*>(base) + bytes);
  }
  __device__ typename Sum<S>::Type at(int i) const { return pack.item[i]; }
};

// One of the two 16-bit numbers in a word.
__device__ inline float half_of(c10::Half, uint32_t word, bool upper) {
  return c10::Half(uint16_t(upper ? word >> 16 : word), c10::Half::from_bits());
}

__device__ inline float half_of(c10::BFloat16, uint32_t word, bool upper) {
  const uint32_t bits = upper ? word & 0xffff0000u : word << 16;  // bfloat16 is the upper half of a float
  float number;
  memcpy(&number, &bits, sizeof(number));
  return number;
}

// Keeps half precision in words, else the compiler splits the zeros into halves and joins them again.
template <typename S>
struct Channels<S, 8> {
  static_assert(sizeof(S) == 2, "eight channels in 16 bytes");
  Pack<uint32_t, 4> pack = {};
  __device__ void read(const S* base, uint64_t bytes) {
    pack = *reinterpret_cast<const Pack<uint32_t, 4>*>(reinterpret_cast<const char*>(base) + bytes);
  }
  __device__ float at(int i) const { return half_of(S(), pack.item[i / 2], i % 2); }
};

template <typename V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    forward_kernel(const Call call, const typename V::S* __restrict__ value,
                   const typename V::T* __restrict__ locations, const typename V::W* __restrict__ attention,
                   const typename V::T* __restrict__ reference, typename V::S* __restrict__ output) {
  using S = typename V::S;
  using T = typename V::T;
  __shared__ Weights<T> staged_weights[kStagedPoints];
  __shared__ Tokens staged_tokens[kStagedPoints];
  const Shape<V> shape(call);
  const uint32_t local = threadIdx.x / shape.lanes, lane = threadIdx.x % shape.lanes;
  const uint32_t unit = blockIdx.x * shape.block_units() + local, head = unit % shape.heads;
  const int64_t image = blockIdx.y, block_point = first_point<V>(call, shape);
  const Source<V> source{settled(reinterpret_cast<const Pack<T, 2>*>(locations) + block_point),
                         settled(attention + block_point), reference + image * call.reference_image};
  const uint32_t step = shape.lanes * V::kVector;
  for (uint32_t first = 0; first < shape.channels; first += step) {
    const uint32_t channel = first + lane * V::kVector;
    const bool busy = unit < call.units && channel < shape.channels;
    const S* rows = settled(value + image * call.tokens * call.row + head * shape.channels + channel);
    T sum[V::kVector] = {};
    for (uint32_t begin = 0; begin < shape.samples; begin += shape.tile) {
      const uint32_t count = V::kFixed ? 12 : min(shape.tile, shape.samples - begin);
      if (!V::kFixed) __syncthreads();  // the previous tile has been read
      stage<V>(call, shape, begin, count, source, staged_weights, staged_tokens);
      __syncthreads();
#pragma unroll
      for (uint32_t i = 0; i < count; ++i) {
        const Tokens tokens = staged_tokens[local * count + i];
        const Weights<T> weights = staged_weights[local * count + i];
        const bool touches = busy && tokens.corner[0] >= 0;
        Channels<S, V::kVector> cell[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (touches) cell[k].read(rows, uint64_t(uint32_t(tokens.corner[k])) * call.row_bytes);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int j = 0; j < V::kVector; ++j) sum[j] += weights.corner[k] * cell[k].at(j);
        }
      }
    }
    if (busy) {
      Pack<S, V::kVector> pack;
#pragma unroll
      for (int j = 0; j < V::kVector; ++j) pack.item[j] = S(sum[j]);
      S* to = output + (image * call.units + unit) * shape.channels + channel;
      *reinterpret_cast<Pack<S, V::kVector>*>(to) = pack;
    }
  }
}

// Atomic additions without the old values. On sm_90, four floats per instruction.
__device__ inline void add(double* to, double x) {
#ifdef __CUDA_ARCH__
  asm volatile("red.global.add.f64 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "d"(x) : "memory");
#else
  *to += x;
#endif
}

__device__ inline void add(float* to, float x) {
#ifdef __CUDA_ARCH__
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "f"(x) : "memory");
#else
  *to += x;
#endif
}

template <typename T, int kCount>
__device__ inline void add_all(T* to, const T (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) add(to + i, x[i]);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ inline void add_four(float* to, float a, float b, float c, float d) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "f"(a), "f"(b),
               "f"(c), "f"(d)
               : "memory");
}
__device__ inline void add_all(float* to, const float (&x)[4]) { add_four(to, x[0], x[1], x[2], x[3]); }
__device__ inline void add_all(float* to, const float (&x)[8]) {
  add_four(to, x[0], x[1], x[2], x[3]);
  add_four(to + 4, x[4], x[5], x[6], x[7]);
}
#endif

// Sums each of the four values over the lanes of a unit, into `to`. Each step moves half of the values, so four sums
// cost little more than one.
template <typename T>
__device__ void sum_over_lanes(const T (&x)[4], uint32_t lanes, uint32_t lane, T* to) {
  constexpr uint32_t kAll = 0xffffffffu;
  if (lanes < 4) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const T total = lanes == 1 ? x[k] : x[k] + __shfl_xor_sync(kAll, x[k], 1);
      if (lane == 0) to[k] = total;
    }
    return;
  }
  const bool odd = lane & 1, second = lane & 2;
  const T a = (odd ? x[2] : x[0]) + __shfl_xor_sync(kAll, odd ? x[0] : x[2], 1);
  const T b = (odd ? x[3] : x[1]) + __shfl_xor_sync(kAll, odd ? x[1] : x[3], 1);
  T total = (second ? b : a) + __shfl_xor_sync(kAll, second ? a : b, 2);
#pragma unroll
  for (uint32_t distance = 4; distance < lanes; distance *= 2) total += __shfl_xor_sync(kAll, total, distance);
  if (lane < 4) to[2 * odd + second] = total;
}

// Step 3 for one point: gradients from dots[corner] = <value at the corner, gradient of the output>. With kFused, of
// the offset instead of the location.
template <typename T, bool kFused>
__device__ void finish_point(const Call& call, uint32_t level, Pack<T, 2> location, T attention, Weights<T> dots,
                             Pack<T, 2>& grad_location, T& grad_attention) {
  const int32_t width = call.width[level], height = call.height[level];
  const Place<T> at(location, width, height);
  const bool left = at.x0 >= 0, right = at.x0 + 1 < width, above = at.y0 >= 0, below = at.y0 + 1 < height;
  const bool valid[4] = {above && left, above && right, below && left, below && right};
  T d[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) d[k] = at.inside && valid[k] ? dots.corner[k] : dots.corner[k] - dots.corner[k];
  const T fx = at.inside ? at.fx : at.poison, fy = at.inside ? at.fy : at.poison;
  const T upper = d[0] + fx * (d[1] - d[0]), lower = d[2] + fx * (d[3] - d[2]);
  const T dx = (d[1] - d[0]) + fy * ((d[3] - d[2]) - (d[1] - d[0]));
  const T dy = lower - upper;
  grad_attention = upper + fy * dy;
  grad_location = {{dx * attention * (kFused ? T(1) : T(width)), dy * attention * (kFused ? T(1) : T(height))}};
}

// Step 3 for all points of the block's tile. `staged` holds the dot products.
template <typename V>
__device__ void finish(const Call& call, const Shape<V>& shape, uint32_t begin, uint32_t count, const Source<V>& source,
                       Weights<typename V::T>* staged, Pack<typename V::T, 2>* grad_locations,
                       typename V::W* grad_weights) {
  using T = typename V::T;
  const uint32_t units = min(shape.block_units(), call.units - blockIdx.x * shape.block_units());
  for (uint32_t i = threadIdx.x; i < units * count; i += kThreads) {
    const Point<V> at(call, shape, i, begin, count);
    Pack<T, 2> location;
    T weight, along;
    source.load(call, shape, at, location, weight);
    finish_point<T, V::kFused>(call, at.level, location, weight, staged[i], grad_locations[at.offset], along);
    if constexpr (V::kFused) {
      staged[i].corner[0] = weight * along, staged[i].corner[1] = weight;
    } else {
      grad_weights[at.offset] = along;
    }
  }
  if constexpr (V::kFused) {  // through the softmax: weight * (gradient - <weights, gradients>)
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < units * count; i += kThreads) {
      const Point<V> at(call, shape, i, begin, count);
      T total = 0;
      for (uint32_t j = 0; j < count; ++j) total += staged[at.unit * count + j].corner[0];
      grad_weights[at.offset] = staged[i].corner[0] - staged[i].corner[1] * total;
    }
  }
}

template <typename V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    backward_kernel(const Call call, const typename V::S* __restrict__ grad_output,
                    const typename V::S* __restrict__ value, const typename V::T* __restrict__ locations,
                    const typename V::W* __restrict__ attention, const typename V::T* __restrict__ reference,
                    typename V::T* __restrict__ grad_value, typename V::T* __restrict__ grad_locations,
                    typename V::W* __restrict__ grad_attention) {
  using S = typename V::S;
  using T = typename V::T;
  __shared__ Weights<T> staged_weights[kStagedPoints];
  __shared__ Tokens staged_tokens[kStagedPoints];
  const Shape<V> shape(call);
  const uint32_t local = threadIdx.x / shape.lanes, lane = threadIdx.x % shape.lanes;
  const uint32_t unit = blockIdx.x * shape.block_units() + local, head = unit % shape.heads;
  const int64_t image = blockIdx.y, block_point = first_point<V>(call, shape);
  const Source<V> source{reinterpret_cast<const Pack<T, 2>*>(locations) + block_point, attention + block_point,
                         reference + image * call.reference_image};
  auto* block_grads = reinterpret_cast<Pack<T, 2>*>(grad_locations) + block_point;
  const int64_t head_row = image * call.tokens * call.row + head * shape.channels;
  const S* rows = settled(value + head_row);
  T* grad_rows = settled(grad_value + head_row);
  const S* grad_row = grad_output + (image * call.units + unit) * shape.channels;
  for (uint32_t begin = 0; begin < shape.samples; begin += shape.tile) {
    const uint32_t count = V::kFixed ? 12 : min(shape.tile, shape.samples - begin);
    if (!V::kFixed) __syncthreads();  // the previous tile has been read
    stage<V>(call, shape, begin, count, source, staged_weights, staged_tokens);
    __syncthreads();
#pragma unroll(V::kFixed ? 4 : 1)
    for (uint32_t i = 0; i < count; ++i) {
      const Tokens tokens = staged_tokens[local * count + i];
      const Weights<T> weights = staged_weights[local * count + i];
      T dot[4] = {};
      for (uint32_t channel = lane * V::kVector; channel < shape.channels; channel += shape.lanes * V::kVector) {
        Channels<S, V::kVector> grad;
        if (unit < call.units) grad.read(grad_row + channel, 0);
        const bool touches = unit < call.units && tokens.corner[0] >= 0;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const uint64_t token = uint32_t(tokens.corner[k]);
          Channels<S, V::kVector> cell;
          if (touches) cell.read(rows + channel, token * call.row_bytes);
          T part[V::kVector];
#pragma unroll
          for (int j = 0; j < V::kVector; ++j) {
            dot[k] += cell.at(j) * grad.at(j);
            part[j] = weights.corner[k] * grad.at(j);
          }
          if (touches) add_all(grad_rows + token * call.row + channel, part);
        }
      }
      __syncwarp();  // all lanes have read the weights; the dot products overwrite them
      sum_over_lanes(dot, shape.lanes, lane, staged_weights[local * count + i].corner);
    }
    __syncthreads();
    finish<V>(call, shape, begin, count, source, staged_weights, block_grads, grad_attention + block_point);
  }
}

}  // namespace eco_m2f
