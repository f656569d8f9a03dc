// Reads the sizes from the arguments, and refuses arguments that do not fit together.
#pragma once

#include <ATen/core/Tensor.h>

#include "problem.h"

namespace eco_m2f {

inline Problem make_problem(const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& locations,
                            const at::Tensor& weights) {
  TORCH_CHECK_VALUE(value.dim() == 4 && locations.dim() == 6 && weights.dim() == 5,
                    "expected value [N,S,M,D], sampling_locations [N,Lq,M,L,P,2], attention_weights [N,Lq,M,L,P], got ",
                    value.sizes(), ", ", locations.sizes(), ", ", weights.sizes());
  TORCH_CHECK_VALUE(int64_t(shapes.size()) == 2 * locations.size(3), "sampling_locations have ", locations.size(3),
                    " levels, but spatial_shapes is ", shapes);
  TORCH_CHECK_VALUE(locations.size(3) <= kMaxLevels, "at most ", kMaxLevels, " levels, got ", locations.size(3));
  TORCH_CHECK_VALUE(locations.size(5) == 2 && locations.sizes().slice(0, 5) == weights.sizes(), "sampling_locations ",
                    locations.sizes(), " must be attention_weights ", weights.sizes(), " + (2,)");
  TORCH_CHECK_VALUE(value.size(0) == locations.size(0) && value.size(2) == locations.size(2),
                    "batch size and heads differ: value ", value.sizes(), ", sampling_locations ", locations.sizes());
  Problem problem{value.size(0),     value.size(1),     value.size(2),    value.size(3),
                  locations.size(1), locations.size(3), locations.size(4)};
  int64_t rest = problem.tokens;
  for (int64_t i = 0; i < problem.levels; ++i) {
    const int64_t height = shapes[2 * i], width = shapes[2 * i + 1];
    TORCH_CHECK_VALUE(height > 0 && width > 0, "spatial_shapes must be positive, got ", shapes);
    // By division, since a product that wraps could equal the number of tokens.
    TORCH_CHECK_VALUE(height <= rest / width, "value has ", problem.tokens, " tokens, but spatial_shapes ", shapes,
                      " make more");
    problem.level[i] = {height, width, problem.tokens - rest};
    rest -= height * width;
  }
  TORCH_CHECK_VALUE(rest == 0, "value has ", problem.tokens, " tokens, but spatial_shapes ", shapes, " make ",
                    problem.tokens - rest);
  return problem;
}

inline void check_devices(const at::Tensor& value, const at::Tensor& other) {
  TORCH_CHECK_VALUE(value.device() == other.device(), "arguments on ", value.device(), " and ", other.device(),
                    ": put them on one device");
}

inline at::ScalarType wide_dtype(const at::Tensor& value) {
  return value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The arguments of ms_deform_attn.
inline Problem make_checked_problem(const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& locations,
                                    const at::Tensor& weights) {
  const Problem problem = make_problem(value, shapes, locations, weights);
  TORCH_CHECK_TYPE(locations.scalar_type() == wide_dtype(value), "sampling_locations must be ", wide_dtype(value),
                   " for a ", value.scalar_type(), " value, got ", locations.scalar_type());
  TORCH_CHECK_TYPE(weights.scalar_type() == value.scalar_type(), "attention_weights must have value's dtype ",
                   value.scalar_type(), ", got ", weights.scalar_type());
  check_devices(value, locations), check_devices(value, weights);
  return problem;
}

// The arguments of ms_deform_attn_fused.
inline Problem make_fused_problem(const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& offsets,
                                  const at::Tensor& logits, const at::Tensor& reference) {
  const Problem p = make_problem(value, shapes, offsets, logits);
  TORCH_CHECK_VALUE(reference.dim() == 4 && (reference.size(0) == p.batch || reference.size(0) == 1) &&
                        reference.size(1) == p.queries && (reference.size(2) == p.levels || reference.size(2) == 1) &&
                        reference.size(3) == 2,
                    "reference_points ", reference.sizes(), " must be [", p.batch, " or 1, ", p.queries, ", ", p.levels,
                    " or 1, 2]");
  for (const at::Tensor* tensor : {&reference, &offsets, &logits}) {
    TORCH_CHECK_TYPE(tensor->scalar_type() == wide_dtype(value),
                     "reference_points, sampling_offsets and "
                     "attention_logits must be ",
                     wide_dtype(value), " for a ", value.scalar_type(), " value, got ", tensor->scalar_type());
    check_devices(value, *tensor);
  }
  return p;
}

inline void check_grad_output(const Problem& p, const at::Tensor& grad_output, const at::Tensor& value) {
  TORCH_CHECK_VALUE(grad_output.sizes() == at::IntArrayRef({p.batch, p.queries, p.heads * p.channels}),
                    "grad_output must be [N, Lq, M*D] = [", p.batch, ", ", p.queries, ", ", p.heads * p.channels,
                    "], got ", grad_output.sizes());
  TORCH_CHECK_TYPE(grad_output.scalar_type() == value.scalar_type(), "grad_output must have value's dtype ",
                   value.scalar_type(), ", got ", grad_output.scalar_type());
  check_devices(value, grad_output);
}

}  // namespace eco_m2f
