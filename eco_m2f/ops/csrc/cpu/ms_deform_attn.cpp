// The op on the CPU: takes tensors apart and shares the work among PyTorch's threads.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "../check.h"
#include "portable.h"

namespace eco_m2f {
namespace {

constexpr int64_t kQueriesPerTask = 64;

at::Tensor forward(const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& locations,
                   const at::Tensor& weights) {
  const Problem p = make_problem(value, shapes, locations, weights);
  const at::Tensor v = value.contiguous(), l = locations.contiguous(), w = weights.contiguous();
  at::Tensor output = at::empty({p.batch, p.queries, p.heads * p.channels}, v.options());
  if (output.numel() == 0) return output;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, v.scalar_type(), "ms_deform_attn", [&] {
    using sum_t = at::opmath_type<scalar_t>;
    const ForwardArguments<scalar_t, sum_t> a{v.const_data_ptr<scalar_t>(), l.const_data_ptr<sum_t>(),
                                              w.const_data_ptr<scalar_t>(), output.mutable_data_ptr<scalar_t>()};
    at::parallel_for(0, p.batch * p.queries, kQueriesPerTask, [&](int64_t begin, int64_t end) {
      std::vector<sum_t> sum(p.channels);
      for (int64_t i = begin; i < end; ++i) portable_forward_query(p, a, i / p.queries, i % p.queries, sum.data());
    });
  });
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad_output, const at::Tensor& value,
                                                        at::IntArrayRef shapes, const at::Tensor& locations,
                                                        const at::Tensor& weights) {
  const Problem p = make_problem(value, shapes, locations, weights);
  check_grad_output(p, grad_output, value);
  const at::Tensor g = grad_output.contiguous(), v = value.contiguous();
  const at::Tensor l = locations.contiguous(), w = weights.contiguous();
  at::Tensor grad_value = at::zeros(v.sizes(), l.options());
  at::Tensor grad_locations = at::empty(l.sizes(), l.options()), grad_weights = at::empty(w.sizes(), w.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, v.scalar_type(), "ms_deform_attn_backward", [&] {
    using sum_t = at::opmath_type<scalar_t>;
    const BackwardArguments<scalar_t, sum_t> a{
        g.const_data_ptr<scalar_t>(),          v.const_data_ptr<scalar_t>(),
        l.const_data_ptr<sum_t>(),             w.const_data_ptr<scalar_t>(),
        grad_value.mutable_data_ptr<sum_t>(),  grad_locations.mutable_data_ptr<sum_t>(),
        grad_weights.mutable_data_ptr<scalar_t>()};
    at::parallel_for(0, p.batch * p.heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) portable_backward_head(p, a, i / p.heads, i % p.heads);
    });
  });
  return {grad_value.to(v.scalar_type()), grad_locations, grad_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(eco_m2f, CPU, m) {
  m.impl("ms_deform_attn", forward);
  m.impl("ms_deform_attn_backward", backward);
}

}  // namespace eco_m2f
