// The op on CUDA devices: checks tensors, lays them out, and runs the kernels on the current stream.
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "../check.h"
#include "../compose.h"
#include "launch.h"

namespace eco_m2f {
namespace {

Storage storage_of(const at::Tensor& value) {
  switch (value.scalar_type()) {
    case at::kDouble:
      return Storage::kDouble;
    case at::kFloat:
      return Storage::kFloat;
    case at::kHalf:
      return Storage::kHalf;
    case at::kBFloat16:
      return Storage::kBFloat16;
    default:
      TORCH_CHECK_TYPE(false, "value must be float64, float32, float16 or bfloat16, got ", value.scalar_type());
  }
}

// Contiguous, and aligned for reads of whole points, since a view may begin anywhere.
at::Tensor aligned(const at::Tensor& tensor) {
  const at::Tensor contiguous = tensor.contiguous();
  const bool is_aligned = reinterpret_cast<uintptr_t>(contiguous.const_data_ptr()) % 16 == 0;
  return is_aligned ? contiguous : contiguous.clone();
}

void check_launch(const char* too_large, const Problem& p) {
  TORCH_CHECK_VALUE(!too_large, "the CUDA kernels cannot take ", too_large, ": batch ", p.batch, ", tokens ", p.tokens,
                    ", queries ", p.queries, ", heads ", p.heads, ", channels ", p.channels, "; split the call");
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor forward(const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& locations,
                   const at::Tensor& weights) {
  const Problem p = make_checked_problem(value, shapes, locations, weights);
  const Storage storage = storage_of(value);
  const c10::cuda::CUDAGuard guard(value.device());
  const at::Tensor v = value.contiguous(), l = aligned(locations), w = weights.contiguous();
  const at::Tensor output = at::empty({p.batch, p.queries, p.heads * p.channels}, v.options());
  if (output.numel() > 0) {
    const ForwardPointers pointers{v.const_data_ptr(), l.const_data_ptr(), w.const_data_ptr(),
                                   output.mutable_data_ptr()};
    check_launch(launch_forward(p, storage, pointers, c10::cuda::getCurrentCUDAStream()), p);
  }
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad_output, const at::Tensor& value,
                                                        at::IntArrayRef shapes, const at::Tensor& locations,
                                                        const at::Tensor& weights) {
  const Problem p = make_checked_problem(value, shapes, locations, weights);
  const Storage storage = storage_of(value);
  check_grad_output(p, grad_output, value);
  at::globalContext().alertNotDeterministic("ms_deform_attn_backward on CUDA");
  const c10::cuda::CUDAGuard guard(value.device());
  const at::Tensor g = grad_output.contiguous(), v = value.contiguous();
  const at::Tensor l = aligned(locations), w = weights.contiguous();
  const at::Tensor grad_value = at::zeros(v.sizes(), l.options());  // hundreds of additions per row: never in half
  const at::Tensor grad_locations = at::empty(l.sizes(), l.options()), grad_weights = at::empty(w.sizes(), w.options());
  if (w.numel() > 0) {
    const BackwardPointers pointers{g.const_data_ptr(),
                                    v.const_data_ptr(),
                                    l.const_data_ptr(),
                                    w.const_data_ptr(),
                                    grad_value.mutable_data_ptr(),
                                    grad_locations.mutable_data_ptr(),
                                    grad_weights.mutable_data_ptr()};
    check_launch(launch_backward(p, storage, pointers, c10::cuda::getCurrentCUDAStream()), p);
  }
  return {grad_value.to(v.scalar_type()), grad_locations, grad_weights};
}

// The reference points for the kernels: [batch or 1, queries, levels or 1, 2], contiguous.
Reference reference_of(const at::Tensor& points) {
  const bool by_image = points.size(0) > 1, by_level = points.size(2) > 1;
  return {points.const_data_ptr(), by_image ? points.stride(0) : 0, points.stride(1), by_level ? 2 : 0};
}

at::Tensor fused_forward(const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& offsets,
                         const at::Tensor& logits, const at::Tensor& reference) {
  const Problem p = make_fused_problem(value, shapes, offsets, logits, reference);
  if (p.levels * p.points > kMaxFusedSamples || p.levels * p.points == 0) {
    const auto [locations, weights, sizes] = materialise(p, offsets, logits, reference);
    return forward(value, shapes, locations, weights.to(value.scalar_type()));
  }
  const c10::cuda::CUDAGuard guard(value.device());
  const at::Tensor v = value.contiguous(), o = aligned(offsets), l = logits.contiguous(), r = reference.contiguous();
  const at::Tensor output = at::empty({p.batch, p.queries, p.heads * p.channels}, v.options());
  if (output.numel() > 0) {
    const ForwardPointers pointers{v.const_data_ptr(), o.const_data_ptr(), l.const_data_ptr(),
                                   output.mutable_data_ptr(), reference_of(r)};
    check_launch(launch_forward(p, storage_of(value), pointers, c10::cuda::getCurrentCUDAStream()), p);
  }
  return output;
}

// Gradients of value, offsets and logits.
std::tuple<at::Tensor, at::Tensor, at::Tensor> fused_backward(const at::Tensor& grad_output, const at::Tensor& value,
                                                              at::IntArrayRef shapes, const at::Tensor& offsets,
                                                              const at::Tensor& logits, const at::Tensor& reference) {
  const Problem p = make_fused_problem(value, shapes, offsets, logits, reference);
  check_grad_output(p, grad_output, value);
  if (p.levels * p.points > kMaxFusedSamples || p.levels * p.points == 0) {
    const auto [locations, weights, sizes] = materialise(p, offsets, logits, reference);
    auto [grad_value, grad_locations, grad_weights] =
        backward(grad_output, value, shapes, locations, weights.to(value.scalar_type()));
    grad_weights = grad_weights.to(weights.scalar_type());
    through_composition(weights, sizes, grad_locations, grad_weights);
    return {grad_value, grad_locations, grad_weights};
  }
  at::globalContext().alertNotDeterministic("ms_deform_attn_fused_backward on CUDA");
  const c10::cuda::CUDAGuard guard(value.device());
  const at::Tensor g = grad_output.contiguous(), v = value.contiguous();
  const at::Tensor o = aligned(offsets), l = logits.contiguous(), r = reference.contiguous();
  const at::Tensor grad_value = at::zeros(v.sizes(), o.options());
  const at::Tensor grad_offsets = at::empty(o.sizes(), o.options()), grad_logits = at::empty(l.sizes(), l.options());
  if (l.numel() > 0) {
    const BackwardPointers pointers{g.const_data_ptr(),
                                    v.const_data_ptr(),
                                    o.const_data_ptr(),
                                    l.const_data_ptr(),
                                    grad_value.mutable_data_ptr(),
                                    grad_offsets.mutable_data_ptr(),
                                    grad_logits.mutable_data_ptr(),
                                    reference_of(r)};
    check_launch(launch_backward(p, storage_of(value), pointers, c10::cuda::getCurrentCUDAStream()), p);
  }
  return {grad_value.to(v.scalar_type()), grad_offsets, grad_logits};
}

}  // namespace

TORCH_LIBRARY_IMPL(eco_m2f, CUDA, m) {
  m.impl("ms_deform_attn", forward);
  m.impl("ms_deform_attn_backward", backward);
  m.impl("ms_deform_attn_fused", fused_forward);
  m.impl("ms_deform_attn_fused_backward", fused_backward);
}

}  // namespace eco_m2f
