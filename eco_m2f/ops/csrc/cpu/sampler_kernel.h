// The vectorised sampler, written once with GCC's vector types. A file per instruction set defines ECO_ISA (its
// namespace) and ECO_VECTOR_BYTES, selects the instruction set, and includes this file. This file must include nothing,
// and use no function that other files could share: the linker would keep one copy for all of them.

namespace eco_m2f {
namespace ECO_ISA {

#define ECO_INLINE static inline __attribute__((always_inline))

constexpr int64_t kAhead = 4;  // queries to prefetch

template <typename T>
struct Vectors {
  static constexpr int kLanes = ECO_VECTOR_BYTES / sizeof(T);
  typedef T Real __attribute__((vector_size(ECO_VECTOR_BYTES)));
  typedef int32_t Int __attribute__((vector_size(kLanes * sizeof(int32_t))));
};

template <typename V, typename T>
ECO_INLINE V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <typename V, typename T>
ECO_INLINE void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// The first `count` lanes from p, and zeros. Reads a whole vector unless that passes `end`. (With a masked load, the
// whole forward took twice the time on Zen 5.)
template <typename V, typename T>
ECO_INLINE V load_first(const T* p, int64_t count, const T* end) {
  constexpr int64_t kLanes = sizeof(V) / sizeof(T);
  if (__builtin_expect(end - p >= kLanes, 1)) return load<V>(p);
  T padded[kLanes] = {};
  for (int64_t i = 0; i < count && i < kLanes; ++i) padded[i] = p[i];
  return load<V>(padded);
}

// Stores the first `count` lanes (any number, also negative or too large) to p, most of them in quarters.
template <typename V, typename T>
ECO_INLINE void store_first(T* p, V v, int64_t count) {
  constexpr int64_t kLanes = sizeof(V) / sizeof(T), kQuarter = kLanes < 4 ? 1 : kLanes / 4;
  if (count >= kLanes) return store(p, v);
  T lanes[kLanes];
  store(lanes, v);
  int64_t i = 0;
  for (; i + kQuarter <= count; i += kQuarter) __builtin_memcpy(p + i, lanes + i, kQuarter * sizeof(T));
  for (; i < count; ++i) p[i] = lanes[i];
}

template <typename V, typename T>
ECO_INLINE V broadcast(T x) {
  return x - V{};
}

// Folds v[0..2*kHalf) into v[0..kHalf): afterwards lane j of v[i] belongs to v[i] or, where j & kHalf, to v[i + kHalf].
template <int kHalf, typename V>
ECO_INLINE void fold(V* v) {
  constexpr int kLanes = sizeof(V) / sizeof(v[0][0]);
  using Mask = decltype(V{} < V{});
  Mask here, across;
#pragma GCC unroll 16
  for (int j = 0; j < kLanes; ++j) {
    here[j] = j + (j & kHalf ? kLanes : 0);
    across[j] = (j ^ kHalf) + (j & kHalf ? kLanes : 0);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kHalf; ++i) {
    v[i] = __builtin_shuffle(v[i], v[i + kHalf], here) + __builtin_shuffle(v[i], v[i + kHalf], across);
  }
}

// Lane i of the result is the sum of all lanes of v[i], which is overwritten.
template <typename V>
ECO_INLINE V sum_each(V* v) {
  constexpr int kLanes = sizeof(V) / sizeof(v[0][0]);
  if constexpr (kLanes > 8) fold<8>(v);
  if constexpr (kLanes > 4) fold<4>(v);
  if constexpr (kLanes > 2) fold<2>(v);
  fold<1>(v);
  return v[0];
}

// Prefetches the inputs of a later query of this head. They are too far apart for the processor to predict.
template <typename T>
ECO_INLINE void prefetch(const HeadTask<T>& task, int64_t query, const T* rows) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t at = query * task.query_samples;
  for (int64_t i = 0; i < 2 * task.samples; i += kLine) __builtin_prefetch(task.locations + 2 * at + i);
  for (int64_t i = 0; i < task.samples; i += kLine) __builtin_prefetch(task.weights + at + i);
  for (int64_t i = 0; rows && i < task.channels; i += kLine) __builtin_prefetch(rows + query * task.query_rows + i);
}

// The locations and weights of one query and head. A vector may read up to the ends.
template <typename T>
struct Inputs {
  const T *locations, *locations_end, *weights, *weights_end;
};

template <typename T>
ECO_INLINE Inputs<T> given(const HeadTask<T>& task, int64_t query) {
  const int64_t at = query * task.query_samples;
  return {task.locations + 2 * at, task.locations_end, task.weights + at, task.weights_end};
}

// Locations = reference point + offset / (width, height), into the scratch; x and y alternate.
template <typename T>
ECO_INLINE void compute_locations(const HeadTask<T>& task, int64_t query) {
  using V = typename Vectors<T>::Real;
  constexpr int kLanes = Vectors<T>::kLanes;
  const T* reference = task.reference + query * task.reference_row;
  const T* offsets = task.locations + 2 * query * task.query_samples;
  T *points = task.scratch + 3 * task.padded_samples, *locations = task.scratch;
  V same;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) same[i] = reference[i & 1];
  for (int64_t i = 0; task.reference_levels > 1 && i < task.samples; ++i) {
    const T* point = reference + 2 * task.table->level[i];
    points[2 * i] = point[0], points[2 * i + 1] = point[1];
  }
  for (int64_t i = 0; i < 2 * task.samples; i += kLanes) {
    const V offset = load_first<V>(offsets + i, 2 * task.samples - i, task.locations_end);
    const V point = task.reference_levels > 1 ? load<V>(points + i) : same;
    store(locations + i, V(point + offset / load<V>(task.table->size.data() + i)));
  }
}

// exp of numbers <= 0, to a few units in the last place: 2^n * exp(r), |r| <= log(2) / 2, exp(r) by its Taylor series.
template <typename V>
ECO_INLINE V exp_not_positive(V x) {
  using T = decltype(x[0] + x[0]);
  using Mask = decltype(V{} < V{});
  constexpr bool kSingle = sizeof(T) == 4;
  constexpr int kTerms = kSingle ? 7 : 13, kMantissa = kSingle ? 23 : 52, kBias = kSingle ? 127 : 1023;
  const T round = kSingle ? T(12582912) : T(6755399441055744);  // 1.5 * 2^mantissa: adding it rounds to whole numbers
  const V n = (x * T(1.44269504088896340736) + round) - round;
  const T high = kSingle ? T(0.693359375) : T(0.693147180369123816490);  // log(2) in two parts, n * high is exact
  const T low = kSingle ? T(-2.12194440054690583e-4) : T(1.90821492927058770002e-10);
  const V r = (x - n * high) - n * low;
  V series = V{} + T(1);
#pragma GCC unroll 16
  for (int i = kTerms; i > 0; --i) series = multiply_add(V(series * r), broadcast<V>(T(1) / T(i)), broadcast<V>(T(1)));
  const Mask exponent = (__builtin_convertvector(n, Mask) + kBias) << kMantissa;
  V power;
  __builtin_memcpy(&power, &exponent, sizeof(V));
  return x < T(kSingle ? -87 : -708) ? V{} : series * power;  // smaller ones vanish beside the largest, 1
}

// Reduces all lanes to one number, with a function of two vectors.
template <typename V, typename Function>
ECO_INLINE V fold_lanes(V v, Function function) {
  constexpr int kLanes = sizeof(V) / sizeof(v[0]);
  using Mask = decltype(V{} < V{});
#pragma GCC unroll 4
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    Mask other;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) other[i] = i ^ distance;
    v = function(v, __builtin_shuffle(v, other));
  }
  return v;
}

// Weights = softmax of the logits over all samples, into the scratch.
template <typename T>
ECO_INLINE void compute_weights(const HeadTask<T>& task, int64_t query) {
  using V = typename Vectors<T>::Real;
  constexpr int kLanes = Vectors<T>::kLanes;
  const T *logits = task.weights + query * task.query_samples, *width = task.table->width.data();
  T* weights = task.scratch + 2 * task.padded_samples;
  const V least = V{} - T(__builtin_inf());
  V top = least;
  for (int64_t i = 0; i < task.samples; i += kLanes) {
    V logit = load_first<V>(logits + i, task.samples - i, task.weights_end);
    logit = load<V>(width + i) < 0 ? least : logit;  // padding
    store(weights + i, logit);
    top = logit > top ? logit : top;
  }
  top = fold_lanes(top, [](V a, V b) __attribute__((always_inline)) { return a > b ? a : b; });
  V sum = {};
  for (int64_t i = 0; i < task.samples; i += kLanes) {
    const V part = exp_not_positive(V(load<V>(weights + i) - top));
    store(weights + i, part);
    sum += part;
  }
  sum = fold_lanes(sum, [](V a, V b) __attribute__((always_inline)) { return a + b; });
  const V factor = T(1) / sum;
  for (int64_t i = 0; i < task.samples; i += kLanes) store(weights + i, V(load<V>(weights + i) * factor));
}

template <typename T>
ECO_INLINE Inputs<T> computed(const HeadTask<T>& task, int64_t query) {
  compute_locations(task, query);
  compute_weights(task, query);
  const T *locations = task.scratch, *weights = locations + 2 * task.padded_samples;
  return {locations, weights, weights, weights + task.padded_samples};
}

// Located samples of one query and head, up to a vector of them.
template <typename T>
struct Located {
  static constexpr int kLanes = Vectors<T>::kLanes;
  int32_t cell[kLanes];  // of the upper left corner
  T weight[4][kLanes];   // attention * bilinear, corners (y0, x0), (y0, x1), (y1, x0), (y1, x1)
  T fx[kLanes], fy[kLanes], attention[kLanes];
};

// Samples [first, first + count) of a query. The pixel is a product and then a difference, never fused: all backends
// must choose the same cell.
template <typename T>
ECO_INLINE void locate(const HeadTask<T>& task, const Inputs<T>& inputs, int64_t first, int64_t count,
                       Located<T>& out) {
  using V = typename Vectors<T>::Real;
  using I = typename Vectors<T>::Int;
  constexpr int kLanes = Vectors<T>::kLanes;
  using Mask = decltype(V{} < V{});
  const T* location = inputs.locations + 2 * first;
  const V front = load_first<V>(location, 2 * count, inputs.locations_end);
  const V back = load_first<V>(location + kLanes, 2 * count - kLanes, inputs.locations_end);
  Mask even, odd;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
  const SampleTable<T>& table = *task.table;
  const V width = load<V>(table.width.data() + first), height = load<V>(table.height.data() + first);
  V x = __builtin_shuffle(front, back, even) * width - T(0.5);
  V y = __builtin_shuffle(front, back, odd) * height - T(0.5);
  const V poison = (x - x) + (y - y);  // 0, or NaN if a coordinate is not finite
  const Mask inside = (x >= T(-1)) & (x < width) & (y >= T(-1)) & (y < height);
  x = inside ? x : V{}, y = inside ? y : V{};
  I x0 = __builtin_convertvector(x, I), y0 = __builtin_convertvector(y, I);  // towards zero; only -1..0 differs
  V fx = x - __builtin_convertvector(x0, V), fy = y - __builtin_convertvector(y0, V);
  const Mask left = fx < 0, above = fy < 0;
  x0 += __builtin_convertvector(left, I), y0 += __builtin_convertvector(above, I);
  fx = left ? fx + 1 : fx, fy = above ? fy + 1 : fy;
  fx += poison, fy += poison;
  const I cell = load<I>(table.origin.data() + first) + y0 * load<I>(table.row_cells.data() + first) + x0;
  const I inside_int = __builtin_convertvector(inside, I);
  store(out.cell, inside_int ? cell : load<I>(table.outside.data() + first));
  const V attention = load_first<V>(inputs.weights + first, count, inputs.weights_end);
  const V lower = attention * fy, upper = attention * (1 - fy);
  store(out.weight[0], V(upper * (1 - fx))), store(out.weight[1], V(upper * fx));
  store(out.weight[2], V(lower * (1 - fx))), store(out.weight[3], V(lower * fx));
  store(out.fx, fx), store(out.fy, fy), store(out.attention, attention);
}

// kVectors vectors make up the channels of a cell. Several sums per channel hide the latency of the additions.
template <typename T, int kVectors, bool kFused>
void forward_queries(const HeadTask<T>& task, int64_t begin, int64_t end) {
  using V = typename Vectors<T>::Real;
  constexpr int kLanes = Vectors<T>::kLanes, kSums = kVectors <= 2 ? 4 : kVectors <= 4 ? 2 : 1;
  const int64_t cell_size = kVectors * kLanes;
  const T* map = task.map;
  const int32_t* row_cells = task.table->row_cells.data();
  for (int64_t query = begin; query < end; ++query) {
    prefetch<T>(task, query + kAhead, nullptr);
    const Inputs<T> inputs = kFused ? computed(task, query) : given(task, query);
    V sum[kSums][kVectors] = {};
    for (int64_t first = 0; first < task.samples; first += kLanes) {
      const int64_t count = task.samples - first < kLanes ? task.samples - first : kLanes;
      Located<T> at;
      locate(task, inputs, first, count, at);
      for (int64_t i = 0; i < count; ++i) {
        const T* upper = map + int64_t(at.cell[i]) * cell_size;
        const T* lower = upper + row_cells[first + i] * cell_size;
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          const T* cell = (k < 2 ? upper : lower) + (k & 1) * cell_size;
          const V weight = broadcast<V>(at.weight[k][i]);
#pragma GCC unroll 8
          for (int j = 0; j < kVectors; ++j) {
            sum[k % kSums][j] = multiply_add(weight, load<V>(cell + j * kLanes), sum[k % kSums][j]);
          }
        }
      }
    }
    T* output = task.output + query * task.query_rows;
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      V total = sum[0][j];
#pragma GCC unroll 4
      for (int k = 1; k < kSums; ++k) total += sum[k][j];
      store_first(output + j * kLanes, total, task.channels - j * kLanes);
    }
  }
}

// Gradients of the samples from dots[corner][sample] = <value at the corner, grad_output>. Fused: of the offsets
// instead of the locations; those of the weights go to the scratch, for finish_softmax.
template <typename T, bool kFused>
ECO_INLINE void finish_backward(const HeadTask<T>& task, int64_t query, int64_t first, int64_t count,
                                const Located<T>& at, const T (*dots)[Vectors<T>::kLanes]) {
  using V = typename Vectors<T>::Real;
  constexpr int kLanes = Vectors<T>::kLanes;
  using Mask = decltype(V{} < V{});
  const V d00 = load<V>(dots[0]), d01 = load<V>(dots[1]), d10 = load<V>(dots[2]), d11 = load<V>(dots[3]);
  const V fx = load<V>(at.fx), fy = load<V>(at.fy), attention = load<V>(at.attention);
  const V upper = d00 + fx * (d01 - d00), lower = d10 + fx * (d11 - d10);
  const V dx = (d01 - d00) + fy * ((d11 - d10) - (d01 - d00));
  V slope_x = dx * attention, slope_y = (lower - upper) * attention;
  if constexpr (!kFused) {
    slope_x *= load<V>(task.table->width.data() + first), slope_y *= load<V>(task.table->height.data() + first);
  }
  Mask front, back;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    front[i] = i / 2 + (i & 1 ? kLanes : 0);
    back[i] = front[i] + kLanes / 2;
  }
  const int64_t to = query * task.query_samples + first;
  T* grad_locations = task.grad_locations + 2 * to;
  const V along = upper + fy * (lower - upper);
  if constexpr (kFused) {
    store(task.scratch + 3 * task.padded_samples + first, along);
  } else {
    store_first(task.grad_weights + to, along, count);
  }
  store_first(grad_locations, __builtin_shuffle(slope_x, slope_y, front), 2 * count);
  store_first(grad_locations + kLanes, __builtin_shuffle(slope_x, slope_y, back), 2 * count - kLanes);
}

// Gradients of the logits from those of the weights: weight * (gradient - <weights, gradients>).
template <typename T>
ECO_INLINE void finish_softmax(const HeadTask<T>& task, int64_t query) {
  using V = typename Vectors<T>::Real;
  constexpr int kLanes = Vectors<T>::kLanes;
  const T *weights = task.scratch + 2 * task.padded_samples, *grads = weights + task.padded_samples;
  V total = {};
  for (int64_t i = 0; i < task.samples; i += kLanes) {
    const V part = load<V>(weights + i) * load<V>(grads + i);
    total += load<V>(task.table->width.data() + i) < 0 ? V{} : part;  // padding may hold anything
  }
  total = fold_lanes(total, [](V a, V b) __attribute__((always_inline)) { return a + b; });
  T* to = task.grad_weights + query * task.query_samples;
  for (int64_t i = 0; i < task.samples; i += kLanes) {
    store_first(to + i, V(load<V>(weights + i) * (load<V>(grads + i) - total)), task.samples - i);
  }
}

template <typename T, int kVectors, bool kFused>
void backward_queries(const HeadTask<T>& task, int64_t begin, int64_t end) {
  using V = typename Vectors<T>::Real;
  constexpr int kLanes = Vectors<T>::kLanes, kGroup = kLanes / 4;  // samples whose dot products are summed together
  static_assert(kGroup > 0, "vectors of at least four lanes");
  const int64_t cell_size = kVectors * kLanes;
  const T* map = task.map;
  T* grad_map = task.grad_map;
  const int32_t* row_cells = task.table->row_cells.data();
  for (int64_t query = begin; query < end; ++query) {
    prefetch<T>(task, query + kAhead, task.grad_output);
    const Inputs<T> inputs = kFused ? computed(task, query) : given(task, query);
    const T* grad_output = task.grad_output + query * task.query_rows;
    V grad[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      grad[j] = load_first<V>(grad_output + j * kLanes, task.channels - j * kLanes, grad_output + task.channels);
    }
    for (int64_t first = 0; first < task.samples; first += kLanes) {
      const int64_t count = task.samples - first < kLanes ? task.samples - first : kLanes;
      Located<T> at;
      locate(task, inputs, first, count, at);
      T dots[4][kLanes] = {};
      for (int64_t group = 0; group < count; group += kGroup) {
        V partial[kLanes];
#pragma GCC unroll 4
        for (int i = 0; i < kGroup; ++i) {  // beyond count, SampleTable sends them outside
          const int64_t upper = int64_t(at.cell[group + i]) * cell_size;
          const int64_t lower = upper + row_cells[first + group + i] * cell_size;
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) {
            const int64_t cell = (k < 2 ? upper : lower) + (k & 1) * cell_size;
            const V weight = broadcast<V>(at.weight[k][group + i]);
            V dot = {};
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j) {
              dot = multiply_add(grad[j], load<V>(map + cell + j * kLanes), dot);
              T* target = grad_map + cell + j * kLanes;
              store(target, multiply_add(weight, grad[j], load<V>(target)));
            }
            partial[k * kGroup + i] = dot;
          }
        }
        T sums[kLanes];
        store(sums, sum_each(partial));
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) __builtin_memcpy(&dots[k][group], sums + k * kGroup, sizeof(T) * kGroup);
      }
      finish_backward<T, kFused>(task, query, first, count, at, dots);
    }
    if constexpr (kFused) finish_softmax(task, query);
  }
}

// Picks the kernel for the number of vectors per cell.
template <typename T, bool kFused>
void forward(const HeadTask<T>& task, int64_t begin, int64_t end) {
  switch (task.staged_channels / Vectors<T>::kLanes) {
    case 1:
      return forward_queries<T, 1, kFused>(task, begin, end);
    case 2:
      return forward_queries<T, 2, kFused>(task, begin, end);
    case 4:
      return forward_queries<T, 4, kFused>(task, begin, end);
    case 8:
      return forward_queries<T, 8, kFused>(task, begin, end);
  }
}

template <typename T, bool kFused>
void backward(const HeadTask<T>& task, int64_t begin, int64_t end) {
  switch (task.staged_channels / Vectors<T>::kLanes) {
    case 1:
      return backward_queries<T, 1, kFused>(task, begin, end);
    case 2:
      return backward_queries<T, 2, kFused>(task, begin, end);
    case 4:
      return backward_queries<T, 4, kFused>(task, begin, end);
    case 8:
      return backward_queries<T, 8, kFused>(task, begin, end);
  }
}

template <typename T>
Sampler<T> sampler(const char* name) {
  constexpr int kLanes = Vectors<T>::kLanes;
  return {name, kLanes, 8 * kLanes, &forward<T, false>, &forward<T, true>, &backward<T, false>, &backward<T, true>};
}

}  // namespace ECO_ISA
}  // namespace eco_m2f
