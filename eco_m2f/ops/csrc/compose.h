// The fused op in PyTorch's operators, for calls that the fused kernels cannot run.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>

#include <tuple>

#include "problem.h"

namespace eco_m2f {

// The locations and weights of a fused call, and (w, h) per level.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor> materialise(const Problem& p, const at::Tensor& offsets,
                                                                  const at::Tensor& logits,
                                                                  const at::Tensor& reference) {
  at::Tensor sizes = at::empty({p.levels, 1, 2}, offsets.options());
  for (int64_t i = 0; i < p.levels; ++i) {
    sizes.select(0, i).select(1, 0).fill_(p.level[i].width), sizes.select(0, i).select(1, 1).fill_(p.level[i].height);
  }
  const at::Tensor locations = at::add(reference.unsqueeze(2).unsqueeze(4), at::div(offsets, sizes));
  return {locations.contiguous(), logits.flatten(3).softmax(-1).view(logits.sizes()).contiguous(), sizes};
}

// Changes the gradients of locations and weights, in place, into those of offsets and logits.
inline void through_composition(const at::Tensor& weights, const at::Tensor& sizes, at::Tensor grad_locations,
                                at::Tensor grad_weights) {
  grad_locations.div_(sizes);
  const at::Tensor total = at::mul(grad_weights, weights).sum({-2, -1}, /*keepdim=*/true);
  grad_weights.sub_(total).mul_(weights);
}

}  // namespace eco_m2f
