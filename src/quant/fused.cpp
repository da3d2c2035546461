#include "fused.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <vector>

#include "grid.h"
#include "grid_kernels.h"

namespace baseq {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

const float* data_or_null(const Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }
float* mutable_data_or_null(const Tensor& t) { return t.defined() ? t.mutable_data_ptr<float>() : nullptr; }

/// Function::apply takes an optional where a tensor may be missing.
std::optional<Tensor> contiguous_if_defined(const Tensor& t) {
  return t.defined() ? std::optional<Tensor>(t.contiguous()) : std::nullopt;
}

/// Rows are handed out in chunks whose number depends on the tensor alone, so that sums over rows do not depend on the
/// number of threads. f(chunk, first_row, last_row).
constexpr int64_t kMaxChunks = 64;
int64_t num_chunks(int64_t rows) { return std::min(rows, kMaxChunks); }

template <class Fn>
void for_each_chunk(int64_t rows, int64_t elements, const Fn& f) {
  const int64_t chunks = num_chunks(rows);
  const int64_t grain = elements < 16384 ? chunks : 1;
  at::parallel_for(0, chunks, std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) f(chunk, rows * chunk / chunks, rows * (chunk + 1) / chunks);
  });
}

struct FusedStatic : torch::autograd::Function<FusedStatic> {
  static Grid grid_at(const Tensor& scale, const Tensor& zero_point, int64_t index, float low, float high) {
    return {.scale = scale.const_data_ptr<float>()[index],
            .zero_point = zero_point.defined() ? zero_point.const_data_ptr<float>()[index] : 0.0F,
            .base = 0,
            .low = low,
            .high = high};
  }

  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& scale,
                        const std::optional<Tensor>& optional_zero_point, int64_t low, int64_t high) {
    const Tensor zero_point = optional_zero_point.value_or(Tensor());
    context->save_for_backward({x, scale, zero_point});
    context->saved_data["low"] = low;
    context->saved_data["high"] = high;
    const Tensor out = at::empty_like(x);
    const int64_t size = x.size(2), groups = x.size(1);
    const float* in = x.const_data_ptr<float>();
    float* result = out.mutable_data_ptr<float>();
    for_each_chunk(x.size(0), x.numel(), [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin * groups; i < end * groups; ++i) {
        const Grid grid = grid_at(scale, zero_point, i, static_cast<float>(low), static_cast<float>(high));
        fake_quantize_group(in + i * size, size, grid, nullptr, result + i * size);
      }
    });
    return out;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const variable_list saved = context->get_saved_variables();
    const Tensor &x = saved[0], &scale = saved[1], &zero_point = saved[2];
    const Tensor grad = grads[0].contiguous();
    const auto low = static_cast<float>(context->saved_data["low"].toInt());
    const auto high = static_cast<float>(context->saved_data["high"].toInt());
    const Tensor x_grad = at::empty_like(x), scale_grad = at::empty_like(scale);
    const Tensor zero_grad = zero_point.defined() ? at::empty_like(zero_point) : Tensor();
    const int64_t size = x.size(2), groups = x.size(1);
    for_each_chunk(x.size(0), x.numel(), [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin * groups; i < end * groups; ++i) {
        const Grid grid = grid_at(scale, zero_point, i, low, high);
        const GridGradient result =
            fake_quantize_group_backward(x.const_data_ptr<float>() + i * size, grad.const_data_ptr<float>() + i * size,
                                         size, grid, x_grad.mutable_data_ptr<float>() + i * size);
        scale_grad.mutable_data_ptr<float>()[i] = static_cast<float>(result.scale);
        if (zero_grad.defined()) {
          zero_grad.mutable_data_ptr<float>()[i] = static_cast<float>(-grid.scale * result.outside);
        }
      }
    });
    return {x_grad, scale_grad, zero_grad, Tensor(), Tensor()};
  }
};

/// The range of one group, the grid over it and the way back to both.
struct DynamicGrid {
  Extremes extremes;
  float clip = 1;
  bool symmetric = false, clamped = false;
  double steps = 0;
  Grid grid;

  DynamicGrid(const Extremes& range, float ratio, const QuantSpec& spec)
      : extremes(range), clip(ratio), symmetric(spec.symmetric) {
    const auto count = static_cast<double>(num_steps(spec));
    steps = symmetric ? count / 2 : count;
    const RangeGrid found = grid_over(range, clip, spec);
    grid = found.grid;
    clamped = found.clamped;
  }

  struct Gradient {
    double low = 0, high = 0, clip = 0;
  };
  Gradient backward(const GridGradient& grad) const {
    const double scale = clamped ? 0 : grad.scale / steps;
    if (symmetric) {
      if (extremes.high >= -extremes.low) return {.high = scale * clip, .clip = scale * extremes.high};
      return {.low = -scale * clip, .clip = -scale * extremes.low};
    }
    const double top = scale, bottom = grad.outside - scale;  // of the ends of the clipped range
    const double half = (static_cast<double>(extremes.high) - extremes.low) / 2;
    return {.low = 0.5 * (top * (1 - clip) + bottom * (1 + clip)),
            .high = 0.5 * (top * (1 + clip) + bottom * (1 - clip)),
            .clip = (top - bottom) * half};
  }
};

struct DynamicOptions {
  QuantSpec spec;
  bool add_shift_back = true;
};

struct FusedDynamic : torch::autograd::Function<FusedDynamic> {
  /// Pointers into the inputs of one call.
  struct Inputs {
    int64_t rows, groups, size;
    const float *x, *clip, *gain, *shift;

    Inputs(const Tensor& source, const Tensor& ratios, const Tensor& multiplier, const Tensor& offset)
        : rows(source.size(0)),
          groups(source.size(1)),
          size(source.size(2)),
          x(source.const_data_ptr<float>()),
          clip(data_or_null(ratios)),
          gain(data_or_null(multiplier)),
          shift(data_or_null(offset)) {}
    const float* gain_at(int64_t group) const { return gain == nullptr ? nullptr : gain + group * size; }
    const float* shift_at(int64_t group) const { return shift == nullptr ? nullptr : shift + group * size; }
    /// gain * x - shift: `buffer`, or x itself when there is nothing to do.
    const float* transformed(int64_t row, int64_t group, std::vector<float>& buffer) const {
      const float* source = x + (row * groups + group) * size;
      if (gain == nullptr && shift == nullptr) return source;
      apply_gain_and_shift(source, gain_at(group), shift_at(group), size, buffer.data());
      return buffer.data();
    }
    DynamicGrid grid(const Extremes& extremes, int64_t group, const QuantSpec& spec) const {
      return {extremes, clip == nullptr ? 1 : clip[group], spec};
    }
  };

  static Tensor forward(AutogradContext* context, const Tensor& x, const std::optional<Tensor>& optional_clip,
                        const std::optional<Tensor>& optional_gain, const std::optional<Tensor>& optional_shift,
                        const DynamicOptions& options) {
    const Tensor clip = optional_clip.value_or(Tensor()), gain = optional_gain.value_or(Tensor()),
                 shift = optional_shift.value_or(Tensor());
    context->save_for_backward({x, clip, gain, shift});
    context->saved_data["needs"] =
        std::vector<bool>{x.requires_grad(), clip.defined() && clip.requires_grad(),
                          gain.defined() && gain.requires_grad(), shift.defined() && shift.requires_grad()};
    context->saved_data["num_bits"] = options.spec.num_bits;
    context->saved_data["symmetric"] = options.spec.symmetric;
    context->saved_data["scale_dtype"] = static_cast<int64_t>(options.spec.scale_dtype);
    context->saved_data["add_shift_back"] = options.add_shift_back;
    const Tensor out = at::empty_like(x);
    float* result = out.mutable_data_ptr<float>();
    const Inputs in(x, clip, gain, shift);
    for_each_chunk(in.rows, x.numel(), [&](int64_t, int64_t begin, int64_t end) {
      std::vector<float> buffer(in.size);
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t group = 0; group < in.groups; ++group) {
          const float* u = in.transformed(row, group, buffer);
          const Grid grid = in.grid(find_range(u, in.size), group, options.spec).grid;
          fake_quantize_group(u, in.size, grid, options.add_shift_back ? in.shift_at(group) : nullptr,
                              result + (row * in.groups + group) * in.size);
        }
      }
    });
    return out;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const variable_list saved = context->get_saved_variables();
    const Tensor& x = saved[0];
    const auto needs = context->saved_data["needs"].toBoolList();
    const QuantSpec spec{.num_bits = context->saved_data["num_bits"].toInt(),
                         .symmetric = context->saved_data["symmetric"].toBool(),
                         .dynamic = true,
                         .scale_dtype = static_cast<at::ScalarType>(context->saved_data["scale_dtype"].toInt())};
    const bool add_shift_back = context->saved_data["add_shift_back"].toBool();
    const Tensor grad = grads[0].contiguous();
    const Inputs in(x, saved[1], saved[2], saved[3]);
    const int64_t chunks = num_chunks(in.rows), features = in.groups * in.size;
    const Tensor x_grad = needs[0] ? at::empty_like(x) : Tensor();
    const Tensor clip_sums = at::zeros({chunks, in.groups, 1}, at::kDouble);
    const Tensor gain_sums = needs[2] ? at::zeros({chunks, features}, at::kFloat) : Tensor();
    const Tensor shift_sums = needs[3] ? at::zeros({chunks, features}, at::kFloat) : Tensor();
    const float* out_grad = grad.const_data_ptr<float>();
    float* x_out = mutable_data_or_null(x_grad);
    float* gain_out = mutable_data_or_null(gain_sums);
    float* shift_out = mutable_data_or_null(shift_sums);
    double* clip_out = clip_sums.mutable_data_ptr<double>();
    for_each_chunk(in.rows, x.numel(), [&](int64_t chunk, int64_t begin, int64_t end) {
      std::vector<float> buffer(in.size), u_grad(in.size);
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t group = 0; group < in.groups; ++group) {
          const int64_t offset = (row * in.groups + group) * in.size, feature = group * in.size;
          const float* u = in.transformed(row, group, buffer);
          const DynamicGrid dynamic = in.grid(find_extremes(u, in.size), group, spec);
          const DynamicGrid::Gradient range = dynamic.backward(
              fake_quantize_group_backward(u, out_grad + offset, in.size, dynamic.grid, u_grad.data()));
          u_grad[dynamic.extremes.low_at] += static_cast<float>(range.low);
          u_grad[dynamic.extremes.high_at] += static_cast<float>(range.high);
          clip_out[chunk * in.groups + group] += range.clip;
          gain_and_shift_backward(in.x + offset, u_grad.data(), add_shift_back ? out_grad + offset : nullptr,
                                  in.gain_at(group), in.size, x_out == nullptr ? nullptr : x_out + offset,
                                  gain_out == nullptr ? nullptr : gain_out + chunk * features + feature,
                                  shift_out == nullptr ? nullptr : shift_out + chunk * features + feature);
        }
      }
    });
    return {x_grad, needs[1] ? clip_sums.sum(0).to(at::kFloat) : Tensor(), needs[2] ? gain_sums.sum(0) : Tensor(),
            needs[3] ? shift_sums.sum(0) : Tensor(), Tensor()};
  }
};

}  // namespace

bool is_fusable(const Tensor& t) { return !t.defined() || (t.is_cpu() && t.scalar_type() == at::kFloat); }

Tensor fused_fake_quantize(const Tensor& grouped, const QParams& qparams, const QuantSpec& spec) {
  return FusedStatic::apply(grouped, qparams.scale.contiguous(), contiguous_if_defined(qparams.zero_point),
                            code_min(spec), code_max(spec));
}

Tensor fused_fake_quantize_dynamic(const Tensor& grouped, const QuantSpec& spec, const Tensor& clip, const Tensor& gain,
                                   const Tensor& shift, bool add_shift_back) {
  return FusedDynamic::apply(grouped, contiguous_if_defined(clip), contiguous_if_defined(gain),
                             contiguous_if_defined(shift), DynamicOptions{spec, add_shift_back});
}

}  // namespace baseq
