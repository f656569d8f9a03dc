// Chooses the variant of a kernel, and cuts the batch into launches of at most Start::kMaxImages images. `Start` runs
// one: start(kernel, blocks, images, arguments...).
#pragma once

#include <algorithm>

#include "kernel.cuh"
#include "pointers.h"

namespace eco_m2f {

template <typename... P>
bool aligned(const P*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// Calls run(variant, plan) with the best variant for S. Returns null, or the quantity that is too large.
template <typename S, bool kFused, typename Run>
const char* with_variant(const Problem& p, const Reference& reference, bool is_aligned, Run run) {
  constexpr int kVector = 16 / sizeof(S);
  const bool wide_reads = is_aligned && p.channels % kVector == 0;
  Plan plan = make_plan(p, wide_reads ? kVector : 1, sizeof(S), kFused);
  if (plan.error) return plan.error;
  plan.call.reference_image = reference.image;
  plan.call.reference_query = uint32_t(reference.query), plan.call.reference_level = uint32_t(reference.level);
  if constexpr (sizeof(S) < 8) {
    if (wide_reads && plan.fixed) return run(Variant<S, kVector, true, kFused>(), plan), nullptr;
  }
  if (wide_reads) return run(Variant<S, kVector, false, kFused>(), plan), nullptr;
  return run(Variant<S, 1, false, kFused>(), plan), nullptr;
}

// Elements per image; pointers move by these from image to image.
struct Strides {
  int64_t value, output, points;

  explicit Strides(const Problem& p)
      : value(p.tokens * p.heads * p.channels),
        output(p.queries * p.heads * p.channels),
        points(p.queries * p.heads * p.levels * p.points) {}
};

template <typename S, bool kFused, typename Start>
const char* forward_as(const Problem& p, ForwardPointers a, const Start& start) {
  using T = typename Sum<S>::Type;
  using W = std::conditional_t<kFused, T, S>;
  const Strides stride(p);
  const T* reference = static_cast<const T*>(a.reference.points);
  return with_variant<S, kFused>(p, a.reference, aligned(a.value, a.output), [&](auto variant, const Plan& plan) {
    for (int64_t i = 0; i < p.batch; i += Start::kMaxImages) {
      start(&forward_kernel<decltype(variant)>, plan.blocks, std::min(Start::kMaxImages, p.batch - i), plan.call,
            static_cast<const S*>(a.value) + i * stride.value,
            static_cast<const T*>(a.locations) + i * stride.points * 2,
            static_cast<const W*>(a.weights) + i * stride.points, reference + i * a.reference.image,
            static_cast<S*>(a.output) + i * stride.output);
    }
  });
}

template <typename S, bool kFused, typename Start>
const char* backward_as(const Problem& p, BackwardPointers a, const Start& start) {
  using T = typename Sum<S>::Type;
  using W = std::conditional_t<kFused, T, S>;
  const Strides stride(p);
  const T* reference = static_cast<const T*>(a.reference.points);
  return with_variant<S, kFused>(
      p, a.reference, aligned(a.value, a.grad_output, a.grad_value), [&](auto variant, const Plan& plan) {
        for (int64_t i = 0; i < p.batch; i += Start::kMaxImages) {
          start(&backward_kernel<decltype(variant)>, plan.blocks, std::min(Start::kMaxImages, p.batch - i), plan.call,
                static_cast<const S*>(a.grad_output) + i * stride.output,
                static_cast<const S*>(a.value) + i * stride.value,
                static_cast<const T*>(a.locations) + i * stride.points * 2,
                static_cast<const W*>(a.weights) + i * stride.points, reference + i * a.reference.image,
                static_cast<T*>(a.grad_value) + i * stride.value,
                static_cast<T*>(a.grad_locations) + i * stride.points * 2,
                static_cast<W*>(a.grad_weights) + i * stride.points);
        }
      });
}

template <bool kFused, typename Start>
const char* forward_of(const Problem& p, Storage storage, const ForwardPointers& pointers, const Start& start) {
  switch (storage) {
    case Storage::kDouble:
      return forward_as<double, kFused>(p, pointers, start);
    case Storage::kFloat:
      return forward_as<float, kFused>(p, pointers, start);
    case Storage::kHalf:
      return forward_as<c10::Half, kFused>(p, pointers, start);
    case Storage::kBFloat16:
      return forward_as<c10::BFloat16, kFused>(p, pointers, start);
  }
  return "an unknown dtype";
}

template <bool kFused, typename Start>
const char* backward_of(const Problem& p, Storage storage, const BackwardPointers& pointers, const Start& start) {
  switch (storage) {
    case Storage::kDouble:
      return backward_as<double, kFused>(p, pointers, start);
    case Storage::kFloat:
      return backward_as<float, kFused>(p, pointers, start);
    case Storage::kHalf:
      return backward_as<c10::Half, kFused>(p, pointers, start);
    case Storage::kBFloat16:
      return backward_as<c10::BFloat16, kFused>(p, pointers, start);
  }
  return "an unknown dtype";
}

// Fused if there is a reference.
template <typename Start>
const char* start_forward(const Problem& p, Storage storage, const ForwardPointers& pointers, const Start& start) {
  return pointers.reference.points ? forward_of<true>(p, storage, pointers, start)
                                   : forward_of<false>(p, storage, pointers, start);
}

template <typename Start>
const char* start_backward(const Problem& p, Storage storage, const BackwardPointers& pointers, const Start& start) {
  return pointers.reference.points ? backward_of<true>(p, storage, pointers, start)
                                   : backward_of<false>(p, storage, pointers, start);
}

}  // namespace eco_m2f
