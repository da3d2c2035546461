#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>

#include "../integer/float_linear.h"
#include "../integer/rows.h"
#include "../quant/bfloat16_product.h"
#include "../quant/product.h"
#include "prepared_block.h"

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

/// Of the whole point; 1 where it has none.
double clip_of(const QuantPoint& point) {
  if (!point.clip.defined()) return 1;
  TORCH_CHECK(point.clip.numel() == 1 && point.clip.scalar_type() == at::kFloat, "a point of linears has the clips ",
              point.clip.sizes(), ", expected one");
  return *point.clip.const_data_ptr<float>();
}

}  // namespace

Tensor with_gain_and_shift(const QuantPoint& point, const Tensor& x) {
  TORCH_CHECK(!point.shift.defined() || !point.add_shift_back,
              "a prepared layer has a point whose shift is not in a bias");
  return gain_and_shift_rows(x, point.gain, point.shift);
}

const Tensor& LinearInput::values() const {
  if (!values_.defined()) values_ = point_->forward(x_);
  return values_;
}

const Tensor& LinearInput::bfloat16_factor() const {
  if (!bfloat16_factor_.defined()) bfloat16_factor_ = baseq::bfloat16_factor(values());
  return bfloat16_factor_;
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
                     : point_->spec.dynamic ? quantize_rows(rows, columns, point_->spec, clip_of(*point_))
                                            : static_codes(rows, columns, *point_);
  return *codes_.emplace_back(std::make_shared<const Activations>(std::move(made)));
}

namespace {

void check_no_gradients() {
  TORCH_CHECK(!c10::GradMode::is_enabled(), "Linear: a prepared layer computes no gradients");
}

Tensor product_of(const PreparedLinear& linear, const LinearInput& x, int64_t fixed_point_bits) {
  check_no_gradients();
  return linear.forward(x.codes(linear, fixed_point_bits));
}

}  // namespace

Tensor Linear::forward(const LinearInput& x) const {
  if (prepared || panels) {
    check_no_gradients();
    std::vector<int64_t> sizes = x.sizes().vec();
    const Tensor y =
        prepared ? product_of(*prepared, x, fixed_point_bits) : panels->forward(x.values().reshape({-1, sizes.back()}));
    sizes.back() = y.size(1);
    return y.view(sizes);
  }
  const Tensor& values = x.values();
  if (rounds_factors(values, weight, bias)) {
    return rounded_linear_product(x.bfloat16_factor(), values.sizes(), weight, bias);
  }
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

void prepare_linears(std::span<Linear* const> linears, bool from_codes, int64_t fixed_point_bits) {
  std::vector<const QuantizedWeight*> weights;
  std::vector<Tensor> biases;
  bool corrected = false;
  for (const Linear* linear : linears) {
    if (!linear->quantized || !from_codes) continue;
    weights.push_back(&*linear->quantized);
    biases.push_back(linear->bias);
    corrected = corrected || linear->lora.defined();
  }
  std::vector<std::shared_ptr<const PreparedLinear>> joined;
  if (linears.size() > 1 && weights.size() == linears.size() && !corrected) {
    joined = PreparedLinear::together(weights, biases);
  }
  for (size_t i = 0; i < linears.size(); ++i) {
    Linear& linear = *linears[i];
    Linear prepared;
    if (!joined.empty()) {
      prepared.prepared = joined[i];
    } else if (linear.quantized && from_codes) {
      prepared.prepared = std::make_shared<const PreparedLinear>(*linear.quantized, linear.lora, linear.bias);
    } else {
      const Tensor weight = linear.weight.defined() ? linear.weight : linear.dequantized();
      prepared.panels = std::make_shared<const FloatLinear>(weight, linear.bias);
    }
    if (prepared.prepared) prepared.fixed_point_bits = fixed_point_bits;
    linear = std::move(prepared);
  }
}

std::vector<Tensor> forward_together(std::initializer_list<const Linear*> linears, const LinearInput& x) {
  const Linear& first = **linears.begin();
  const PreparedLinear* joint = first.prepared ? first.prepared->joint().get() : nullptr;
  const bool together = joint != nullptr && std::ranges::all_of(linears, [&](const Linear* linear) {
                          return linear->prepared && linear->prepared->joint().get() == joint;
                        });
  std::vector<Tensor> outputs;
  if (!together) {
    for (const Linear* linear : linears) outputs.push_back(linear->forward(x));
    return outputs;
  }
  std::vector<int64_t> sizes = x.sizes().vec();
  const Tensor y = product_of(*joint, x, first.fixed_point_bits);
  sizes.back() = y.size(1);
  const Tensor all = y.view(sizes);
  for (const Linear* linear : linears) {
    outputs.push_back(all.narrow(-1, linear->prepared->first_row(), linear->prepared->out_features()));
  }
  return outputs;
}

void DecoderLayer::prepare(int64_t fixed_point_bits) {
  TORCH_CHECK(fixed_point_bits == 8 || fixed_point_bits == 15, "prepare: fixed_point_bits is ", fixed_point_bits,
              ", expected 8 or 15");
  for (const SiteInfo& info : sites()) {
    if (!info.is_input()) continue;
    const QuantPoint& input = point(info.site);
    const bool one_grid =
        !input.enabled || !input.spec.dynamic || (input.spec.strategy == Strategy::kToken && !input.runtime);
    std::vector<Linear*> readers;
    for (const std::string_view name : info.readers) readers.push_back(&linear(name));
    prepare_linears(readers, one_grid, fixed_point_bits);
  }
  self_attn.exact = mlp.exact = true;
  for_each_norm([](const std::string&, RmsNorm& norm) { norm.exact = true; });
}

}  // namespace baseq
