// The op on the CPU: stages the maps head by head, and divides the work among PyTorch's threads.
//
// Value may be stored in half or bfloat16; all arithmetic is in T = float (double for double).
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "../check.h"
#include "../compose.h"
#include "large_tensor.h"
#include "portable.h"
#include "sampler.h"

namespace eco_m2f {
namespace {

constexpr int64_t kQueriesPerTask = 64, kCellsPerTask = 1024;

// A limit to the instruction set, for tests; empty for none.
std::string& sampler_limit() {
  static std::string limit;
  return limit;
}

std::string limit_cpu_sampler(std::string limit) {
  TORCH_CHECK_VALUE(limit.empty() || limit == "avx512" || limit == "avx2" || limit == "baseline" || limit == "portable",
                    "limit must be empty, avx512, avx2, baseline or portable, got ", limit);
  sampler_limit() = limit;
  const Sampler<float>* sampler = choose_sampler<float>(limit);
  return sampler ? sampler->name : "portable";
}

// The sampler for this call. Null if staging is impossible or does not pay, as for few queries on large maps.
template <typename T>
const Sampler<T>* sampler_for(const Problem& p) {
  const Sampler<T>* sampler = choose_sampler<T>(sampler_limit());
  if (!sampler || p.channels > sampler->max_channels || p.channels == 0) return nullptr;
  if (4 * p.queries * p.levels * p.points < p.tokens) return nullptr;
  return StagedLayout(p, sampler->lanes).cells < std::numeric_limits<int32_t>::max() ? sampler : nullptr;
}

// The state of the rounds below. A unit is one head of one image. A round stages as many units as there are threads,
// and then samples them. The copies are then small enough for the cache.
template <typename T>
struct Plan {
  const Problem& p;
  StagedLayout layout;
  SampleTable<T> table;
  int64_t units, units_per_round, map_size;

  Plan(const Problem& problem, const Sampler<T>& sampler)
      : p(problem), layout(problem, sampler.lanes), table(problem, layout, sampler.lanes) {
    units = p.batch * p.heads;
    units_per_round = std::max<int64_t>(1, std::min<int64_t>(units, at::get_num_threads()));
    map_size = layout.cells * layout.channels;
  }

  HeadTask<T> task(int64_t unit, const T* map, const at::Tensor& locations, const at::Tensor& weights) const {
    const int64_t image = unit / p.heads, head = unit % p.heads, samples = p.levels * p.points;
    const int64_t first = (image * p.queries * p.heads + head) * samples;
    HeadTask<T> task{};
    task.channels = p.channels, task.samples = samples;
    task.query_rows = p.heads * p.channels, task.query_samples = p.heads * samples;
    task.staged_channels = layout.channels, task.table = &table, task.map = map;
    task.locations = locations.const_data_ptr<T>() + 2 * first, task.weights = weights.const_data_ptr<T>() + first;
    task.locations_end = locations.const_data_ptr<T>() + locations.numel();
    task.weights_end = weights.const_data_ptr<T>() + weights.numel();
    return task;
  }

  // Only for the fused forward; reference [batch or 1, queries, levels or 1, 2].
  void add_reference(HeadTask<T>& task, int64_t unit, const at::Tensor& reference, std::vector<T>& room) const {
    const int64_t image = reference.size(0) == 1 ? 0 : unit / p.heads;
    task.reference_levels = reference.size(2), task.reference_row = 2 * task.reference_levels;
    task.reference = reference.const_data_ptr<T>() + image * p.queries * task.reference_row;
    task.padded_samples = int64_t(table.width.size()), task.scratch = room.data();
  }

  // The offset of a unit's first row in a tensor [batch, tokens or queries, heads, channels].
  int64_t first_row(int64_t unit, int64_t rows) const {
    return (unit / p.heads * rows * p.heads + unit % p.heads) * p.channels;
  }

  template <typename S>
  void stage(const S* value, int64_t first_unit, int64_t count, T* maps) const {
    at::parallel_for(0, count * layout.cells, kCellsPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin / layout.cells; i * layout.cells < end; ++i) {
        const int64_t offset = i * layout.cells;
        stage_cells(p, layout, value + first_row(first_unit + i, p.tokens), maps + i * map_size,
                    std::max(begin - offset, int64_t(0)), std::min(end - offset, layout.cells));
      }
    });
  }
};

// With a reference, `locations` and `weights` are offsets and logits.
template <typename S, typename T>
void staged_forward(const Problem& p, const Sampler<T>& sampler, const at::Tensor& value, const at::Tensor& reference,
                    const at::Tensor& locations, const at::Tensor& weights, const at::Tensor& output) {
  const auto kernel = reference.defined() ? sampler.fused_forward : sampler.forward;
  const Plan<T> plan(p, sampler);
  const at::Tensor scratch = empty_large({plan.units_per_round, plan.map_size}, locations.options());
  T* maps = scratch.mutable_data_ptr<T>();
  for (int64_t unit = 0; unit < plan.units; unit += plan.units_per_round) {
    const int64_t count = std::min(plan.units_per_round, plan.units - unit);
    plan.stage(value.const_data_ptr<S>(), unit, count, maps);
    at::parallel_for(0, count * p.queries, kQueriesPerTask, [&](int64_t begin, int64_t end) {
      std::vector<T> room(reference.defined() ? 5 * plan.table.width.size() : 0);
      for (int64_t i = begin / p.queries; i * p.queries < end; ++i) {
        HeadTask<T> task = plan.task(unit + i, maps + i * plan.map_size, locations, weights);
        if (reference.defined()) plan.add_reference(task, unit + i, reference, room);
        task.output = output.mutable_data_ptr<T>() + plan.first_row(unit + i, p.queries);
        const int64_t offset = i * p.queries;
        kernel(task, std::max(begin - offset, int64_t(0)), std::min(end - offset, p.queries));
      }
    });
  }
}

template <typename S, typename T>
void portable_forward(const Problem& p, const at::Tensor& value, const at::Tensor& locations, const at::Tensor& weights,
                      const at::Tensor& output) {
  const ForwardArguments<S, T> a{value.const_data_ptr<S>(), locations.const_data_ptr<T>(), weights.const_data_ptr<T>(),
                                 output.mutable_data_ptr<T>()};
  at::parallel_for(0, p.batch * p.queries, kQueriesPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) portable_forward_query(p, a, i / p.queries, i % p.queries);
  });
}

at::Tensor forward(const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& locations,
                   const at::Tensor& weights) {
  const Problem p = make_checked_problem(value, shapes, locations, weights);
  const at::Tensor v = value.contiguous(), l = locations.contiguous();
  const at::Tensor w = weights.to(l.scalar_type()).contiguous();
  const at::Tensor output = empty_large({p.batch, p.queries, p.heads * p.channels}, l.options());
  if (output.numel() > 0) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, v.scalar_type(), "ms_deform_attn", [&] {
      using T = at::opmath_type<scalar_t>;
      if (const Sampler<T>* sampler = sampler_for<T>(p)) {
        staged_forward<scalar_t, T>(p, *sampler, v, at::Tensor(), l, w, output);
      } else {
        portable_forward<scalar_t, T>(p, v, l, w, output);
      }
    });
  }
  return output.to(v.scalar_type());
}

at::Tensor fused_forward(const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& offsets,
                         const at::Tensor& logits, const at::Tensor& reference) {
  const Problem p = make_fused_problem(value, shapes, offsets, logits, reference);
  const at::Tensor v = value.contiguous(), r = reference.contiguous();
  const at::Tensor output = empty_large({p.batch, p.queries, p.heads * p.channels}, offsets.options());
  if (output.numel() == 0) return output.to(v.scalar_type());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, v.scalar_type(), "ms_deform_attn_fused", [&] {
    using T = at::opmath_type<scalar_t>;
    if (const Sampler<T>* sampler = sampler_for<T>(p)) {
      staged_forward<scalar_t, T>(p, *sampler, v, r, offsets.contiguous(), logits.contiguous(), output);
    } else {
      const auto [locations, weights, sizes] = materialise(p, offsets, logits, r);
      portable_forward<scalar_t, T>(p, v, locations, weights, output);
    }
  });
  return output.to(v.scalar_type());
}

// The gradients that the kernels fill.
struct Gradients {
  at::Tensor value, locations, weights;
};

// With a reference, `locations` and `weights` are offsets and logits. With more threads than units, the queries of each
// unit are split; each part then adds to its own map.
template <typename S, typename T>
void staged_backward(const Problem& p, const Sampler<T>& sampler, const at::Tensor& grad_output,
                     const at::Tensor& value, const at::Tensor& reference, const at::Tensor& locations,
                     const at::Tensor& weights, const Gradients& gradients) {
  const auto kernel = reference.defined() ? sampler.fused_backward : sampler.backward;
  const Plan<T> plan(p, sampler);
  const int64_t parts = (at::get_num_threads() + plan.units_per_round - 1) / plan.units_per_round;
  const at::Tensor scratch = empty_large({plan.units_per_round, plan.map_size}, locations.options());
  const at::Tensor grad_scratch = empty_large({plan.units_per_round, parts, plan.map_size}, locations.options());
  T *maps = scratch.mutable_data_ptr<T>(), *grad_maps = grad_scratch.mutable_data_ptr<T>();
  for (int64_t unit = 0; unit < plan.units; unit += plan.units_per_round) {
    const int64_t count = std::min(plan.units_per_round, plan.units - unit);
    plan.stage(value.const_data_ptr<S>(), unit, count, maps);
    at::parallel_for(0, count * parts, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> room(reference.defined() ? 5 * plan.table.width.size() : 0);
      for (int64_t i = begin; i < end; ++i) {
        HeadTask<T> task = plan.task(unit + i / parts, maps + i / parts * plan.map_size, locations, weights);
        if (reference.defined()) plan.add_reference(task, unit + i / parts, reference, room);
        const int64_t sample = task.weights - weights.const_data_ptr<T>(), part = i % parts;
        task.grad_output = grad_output.const_data_ptr<T>() + plan.first_row(unit + i / parts, p.queries);
        task.grad_map = grad_maps + i * plan.map_size;
        task.grad_locations = gradients.locations.mutable_data_ptr<T>() + 2 * sample;
        task.grad_weights = gradients.weights.mutable_data_ptr<T>() + sample;
        std::fill(task.grad_map, task.grad_map + plan.map_size, T(0));
        kernel(task, p.queries * part / parts, p.queries * (part + 1) / parts);
      }
    });
    at::parallel_for(0, count * p.tokens, kCellsPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin / p.tokens; i * p.tokens < end; ++i) {
        unstage_tokens(p, plan.layout, grad_maps + i * parts * plan.map_size, parts,
                       gradients.value.mutable_data_ptr<S>() + plan.first_row(unit + i, p.tokens),
                       std::max(begin - i * p.tokens, int64_t(0)), std::min(end - i * p.tokens, p.tokens));
      }
    });
  }
}

template <typename S, typename T>
void portable_backward(const Problem& p, const at::Tensor& grad_output, const at::Tensor& value,
                       const at::Tensor& locations, const at::Tensor& weights, const Gradients& gradients) {
  const at::Tensor grad_value = at::zeros(value.sizes(), locations.options());
  const BackwardArguments<S, T> a{grad_output.const_data_ptr<T>(),        value.const_data_ptr<S>(),
                                  locations.const_data_ptr<T>(),          weights.const_data_ptr<T>(),
                                  grad_value.mutable_data_ptr<T>(),       gradients.locations.mutable_data_ptr<T>(),
                                  gradients.weights.mutable_data_ptr<T>()};
  at::parallel_for(0, p.batch * p.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) portable_backward_head(p, a, i / p.heads, i % p.heads);
  });
  gradients.value.copy_(grad_value);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad_output, const at::Tensor& value,
                                                        at::IntArrayRef shapes, const at::Tensor& locations,
                                                        const at::Tensor& weights) {
  const Problem p = make_checked_problem(value, shapes, locations, weights);
  check_grad_output(p, grad_output, value);
  const at::Tensor v = value.contiguous(), l = locations.contiguous();
  const at::Tensor g = grad_output.to(l.scalar_type()).contiguous(), w = weights.to(l.scalar_type()).contiguous();
  const Gradients gradients{empty_large(v.sizes(), v.options()), empty_large(l.sizes(), l.options()),
                            empty_large(w.sizes(), w.options())};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, v.scalar_type(), "ms_deform_attn_backward", [&] {
    using T = at::opmath_type<scalar_t>;
    const Sampler<T>* sampler = g.numel() > 0 ? sampler_for<T>(p) : nullptr;
    if (sampler) {
      staged_backward<scalar_t, T>(p, *sampler, g, v, at::Tensor(), l, w, gradients);
    } else {
      portable_backward<scalar_t, T>(p, g, v, l, w, gradients);
    }
  });
  return {gradients.value, gradients.locations, gradients.weights.to(v.scalar_type())};
}

// Gradients of value, offsets and logits.
std::tuple<at::Tensor, at::Tensor, at::Tensor> fused_backward(const at::Tensor& grad_output, const at::Tensor& value,
                                                              at::IntArrayRef shapes, const at::Tensor& offsets,
                                                              const at::Tensor& logits, const at::Tensor& reference) {
  const Problem p = make_fused_problem(value, shapes, offsets, logits, reference);
  check_grad_output(p, grad_output, value);
  const at::Tensor v = value.contiguous(), o = offsets.contiguous(), l = logits.contiguous();
  const at::Tensor g = grad_output.to(o.scalar_type()).contiguous(), r = reference.contiguous();
  Gradients gradients{empty_large(v.sizes(), v.options()), empty_large(o.sizes(), o.options()),
                      empty_large(l.sizes(), l.options())};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, v.scalar_type(), "ms_deform_attn_fused_backward", [&] {
    using T = at::opmath_type<scalar_t>;
    const Sampler<T>* sampler = g.numel() > 0 ? sampler_for<T>(p) : nullptr;
    if (sampler) {
      staged_backward<scalar_t, T>(p, *sampler, g, v, r, o, l, gradients);
    } else {
      const auto [locations, weights, sizes] = materialise(p, o, l, r);
      portable_backward<scalar_t, T>(p, g, v, locations, weights, gradients);
      through_composition(weights, sizes, gradients.locations, gradients.weights);
    }
  });
  return {gradients.value, gradients.locations, gradients.weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(eco_m2f, CPU, m) {
  m.impl("ms_deform_attn", forward);
  m.impl("ms_deform_attn_backward", backward);
  m.impl("ms_deform_attn_fused", fused_forward);
  m.impl("ms_deform_attn_fused_backward", fused_backward);
}

TORCH_LIBRARY_FRAGMENT(eco_m2f, m) {
  // Limits the instruction set of the CPU kernels, for tests, and returns the one in use.
  m.def("limit_cpu_sampler", limit_cpu_sampler);
}

}  // namespace eco_m2f
