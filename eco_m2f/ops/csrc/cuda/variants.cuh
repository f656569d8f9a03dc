// Chooses a kernel's variant and cuts the batch into launches. `Start` launches one: start(kernel, blocks, images,
// arguments...), with at most Start::kMaxImages images.
#pragma once

#include <algorithm>

#include "kernel.cuh"
#include "pointers.h"

namespace eco_m2f {

template <typename... P>
bool aligned(const P*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// Calls run(variant, plan) with the best variant for S; returns null or what is too large.
template <typename S, typename Run>
const char* with_variant(const Problem& p, bool is_aligned, Run run) {
  constexpr int kVector = 16 / sizeof(S);
  const bool wide_reads = is_aligned && p.channels % kVector == 0;
  const Plan plan = make_plan(p, wide_reads ? kVector : 1, sizeof(S));
  if (plan.error) return plan.error;
  if constexpr (sizeof(S) < 8) {
    if (wide_reads && plan.fixed) return run(Variant<S, kVector, true>(), plan), nullptr;
  }
  if (wide_reads) return run(Variant<S, kVector, false>(), plan), nullptr;
  return run(Variant<S, 1, false>(), plan), nullptr;
}

// Elements of one image, by which the pointers move from image to image.
struct Strides {
  int64_t value, output, points;

  explicit Strides(const Problem& p)
      : value(p.tokens * p.heads * p.channels),
        output(p.queries * p.heads * p.channels),
        points(p.queries * p.heads * p.levels * p.points) {}
};

template <typename S, typename Start>
const char* forward_as(const Problem& p, ForwardPointers a, const Start& start) {
  using T = typename Sum<S>::Type;
  const Strides stride(p);
  return with_variant<S>(p, aligned(a.value, a.output), [&](auto variant, const Plan& plan) {
    for (int64_t i = 0; i < p.batch; i += Start::kMaxImages) {
      start(&forward_kernel<decltype(variant)>, plan.blocks, std::min(Start::kMaxImages, p.batch - i), plan.call,
            static_cast<const S*>(a.value) + i * stride.value,
            static_cast<const T*>(a.locations) + i * stride.points * 2,
            static_cast<const S*>(a.weights) + i * stride.points, static_cast<S*>(a.output) + i * stride.output);
    }
  });
}

template <typename S, typename Start>
const char* backward_as(const Problem& p, BackwardPointers a, const Start& start) {
  using T = typename Sum<S>::Type;
  const Strides stride(p);
  return with_variant<S>(p, aligned(a.value, a.grad_output, a.grad_value), [&](auto variant, const Plan& plan) {
    for (int64_t i = 0; i < p.batch; i += Start::kMaxImages) {
      start(&backward_kernel<decltype(variant)>, plan.blocks, std::min(Start::kMaxImages, p.batch - i), plan.call,
            static_cast<const S*>(a.grad_output) + i * stride.output, static_cast<const S*>(a.value) + i * stride.value,
            static_cast<const T*>(a.locations) + i * stride.points * 2,
            static_cast<const S*>(a.weights) + i * stride.points, static_cast<T*>(a.grad_value) + i * stride.value,
            static_cast<T*>(a.grad_locations) + i * stride.points * 2,
            static_cast<S*>(a.grad_weights) + i * stride.points);
    }
  });
}

template <typename Start>
const char* start_forward(const Problem& p, Storage storage, ForwardPointers pointers, const Start& start) {
  switch (storage) {
    case Storage::kDouble:
      return forward_as<double>(p, pointers, start);
    case Storage::kFloat:
      return forward_as<float>(p, pointers, start);
    case Storage::kHalf:
      return forward_as<c10::Half>(p, pointers, start);
    case Storage::kBFloat16:
      return forward_as<c10::BFloat16>(p, pointers, start);
  }
  return "an unknown dtype";
}

template <typename Start>
const char* start_backward(const Problem& p, Storage storage, BackwardPointers pointers, const Start& start) {
  switch (storage) {
    case Storage::kDouble:
      return backward_as<double>(p, pointers, start);
    case Storage::kFloat:
      return backward_as<float>(p, pointers, start);
    case Storage::kHalf:
      return backward_as<c10::Half>(p, pointers, start);
    case Storage::kBFloat16:
      return backward_as<c10::BFloat16>(p, pointers, start);
  }
  return "an unknown dtype";
}

}  // namespace eco_m2f
