#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include "../integer/float_linear.h"
#include "../quant/product.h"
#include "block_cache.h"

namespace baseq {
namespace {

/// Codes of a grid that does not depend on the rows.
Activations static_codes(const Tensor& rows, const ColumnGroups& columns, const QuantPoint& point) {
  const Tensor codes = quantize(rows, point.qparams, point.spec);
  const int64_t padding = columns.padded_group() - columns.group_size;
  Activations result{.columns = columns, .num_bits = point.spec.num_bits};
  const Tensor grouped = codes.view({rows.size(0), 1, columns.count(), columns.group_size});
  result.sums = grouped.sum(-1, /*keepdim=*/false, at::kInt);
  result.codes = at::constant_pad_nd(grouped, {0, padding}).view({rows.size(0), 1, -1}).contiguous();
  result.scale = point.qparams.scale.to(at::kFloat).reshape({1, 1}).expand({rows.size(0), 1}).contiguous();
  if (point.spec.symmetric) return result;
  const Tensor base = -(point.qparams.zero_point.to(at::kFloat) * point.qparams.scale.to(at::kFloat));
  result.base = base.reshape({1}).expand({rows.size(0)}).contiguous();
  return result;
}

}  // namespace

Tensor with_gain_and_shift(const QuantPoint& point, const Tensor& x) {
  TORCH_CHECK(!point.shift.defined() || !point.add_shift_back,
              "a prepared layer has a point whose shift is not in a bias");
  const Tensor scaled = point.gain.defined() ? x * point.gain : x;
  return point.shift.defined() ? scaled - point.shift : scaled;
}

const Tensor& LinearInput::values() const {
  if (!values_.defined()) values_ = point_->forward(x_);
  return values_;
}

const Activations& LinearInput::codes(const PreparedLinear& reader, int64_t fixed_point_bits) const {
  const ColumnGroups& columns = reader.columns();
  const bool quantized = point_ != nullptr && point_->enabled;
  for (const auto& known : codes_) {
    if (known->columns == columns && (quantized || known->num_bits == fixed_point_bits)) return *known;
  }
  const Tensor& x = point_ != nullptr ? x_ : values_;
  const Tensor rows = (point_ != nullptr ? with_gain_and_shift(*point_, x) : x).reshape({-1, x.size(-1)});
  Activations made = !quantized             ? fixed_point_rows(rows, columns, fixed_point_bits)
                     : point_->spec.dynamic ? quantize_rows(rows, columns, point_->spec,
                                                            point_->clip.defined() ? point_->clip.item<double>() : 1)
                                            : static_codes(rows, columns, *point_);
  return *codes_.emplace_back(std::make_shared<const Activations>(std::move(made)));
}

Tensor Linear::forward(const LinearInput& x) const {
  if (prepared || panels) {
    TORCH_CHECK(!c10::GradMode::is_enabled(), "Linear: a prepared layer computes no gradients");
    std::vector<int64_t> sizes = x.sizes().vec();
    const Tensor y = prepared ? prepared->forward(x.codes(*prepared, fixed_point_bits))
                              : panels->forward(x.values().reshape({-1, sizes.back()}));
    sizes.back() = y.size(1);
    return y.view(sizes);
  }
  const Tensor& values = x.values();
  if (weight.scalar_type() == values.scalar_type()) return linear_product(values, weight, bias);
  const Tensor product = at::linear(values.to(weight.scalar_type()), weight).to(values.scalar_type());
  return bias.defined() ? product + bias : product;
}

Tensor Linear::dequantized() const {
  TORCH_CHECK(quantized, "Linear::dequantized: the layer has no codes");
  Tensor sum = quantized->dequantized();
  if (lora.defined()) sum += lora.product().to(sum.device());
  return sum;
}

Linear prepared_linear(const Linear& linear, bool from_codes, int64_t fixed_point_bits) {
  Linear repacked;
  if (linear.quantized && from_codes) {
    repacked.prepared = std::make_shared<const PreparedLinear>(*linear.quantized, linear.lora, linear.bias);
    repacked.fixed_point_bits = fixed_point_bits;
  } else {
    const Tensor weight = linear.weight.defined() ? linear.weight : linear.dequantized();
    repacked.panels = std::make_shared<const FloatLinear>(weight, linear.bias);
  }
  return repacked;
}

void DecoderLayer::prepare(int64_t fixed_point_bits) {
  TORCH_CHECK(fixed_point_bits == 8 || fixed_point_bits == 15, "prepare: fixed_point_bits is ", fixed_point_bits,
              ", expected 8 or 15");
  for_each_linear([&](const std::string& name, Linear& linear) {
    const QuantPoint& input = point(input_site(name));
    const bool one_grid =
        !input.enabled || !input.spec.dynamic || (input.spec.strategy == Strategy::kToken && !input.runtime);
    linear = prepared_linear(linear, one_grid, fixed_point_bits);
  });
  self_attn.exact = mlp.exact = true;
  for_each_norm([](const std::string&, RmsNorm& norm) { norm.exact = true; });
}

}  // namespace baseq
