#include "prepared_linear.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#include "../quant/grid.h"
#include "weight_layout.h"
#include "weight_memory.h"

namespace baseq {
namespace {

constexpr int64_t kProductsPerTask = 1 << 16;

int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

StoredType stored_type(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return StoredType::kFloat;
    case at::kBFloat16:
      return StoredType::kBFloat16;
    case at::kHalf:
      return StoredType::kHalf;
    case at::kChar:
      return StoredType::kInt8;
    default:
      TORCH_CHECK(false, "PreparedLinear: factors are ", dtype, ", expected float32, float16, bfloat16 or int8");
  }
}

ColumnGroups checked_columns(const QuantizedWeight& weight) {
  const QuantSpec& spec = weight.spec;
  check_weight_spec("PreparedLinear", spec);
  TORCH_CHECK(weight.codes.defined() && weight.codes.dim() == 2 && weight.codes.scalar_type() == at::kChar &&
                  weight.codes.device().is_cpu() && weight.codes.numel() > 0,
              "PreparedLinear: codes are not an int8 matrix on the CPU");
  const int64_t out = weight.codes.size(0), in = weight.codes.size(1);
  const ColumnGroups columns{in, spec.strategy == Strategy::kGroup ? spec.group_size : in};
  TORCH_CHECK(in % columns.group_size == 0, "PreparedLinear: groups of ", columns.group_size, " do not divide ", in,
              " inputs");
  TORCH_CHECK(columns.padded_group() <= kMaxGroupColumns, "PreparedLinear: ", columns.group_size,
              " columns share a scale; the sums hold at most ", kMaxGroupColumns, ". Use groups");
  const int64_t rows = spec.strategy == Strategy::kTensor ? 1 : out;
  const auto check = [&](const char* name, const Tensor& t) {
    TORCH_CHECK(t.defined() && t.scalar_type() == at::kFloat && t.sizes() == at::IntArrayRef({rows, columns.count()}),
                "PreparedLinear: the ", name, " of the weight are not float32 [", rows, ", ", columns.count(), "]");
  };
  check("scales", weight.qparams.scale);
  TORCH_CHECK(weight.qparams.zero_point.defined() != spec.symmetric, "PreparedLinear: ",
              spec.symmetric ? "a symmetric grid has zero points" : "an asymmetric grid has no zero points");
  if (!spec.symmetric) check("zero points", weight.qparams.zero_point);
  return columns;
}

/// [rows, columns] -> [rows / 16, columns, 16], rows and columns padded with zeros.
Tensor in_panels(const Tensor& matrix, int64_t columns) {
  const int64_t rows = rounded_up(matrix.size(0), kPanelRows);
  return at::constant_pad_nd(matrix, {0, columns - matrix.size(1), 0, rows - matrix.size(0)})
      .view({-1, kPanelRows, columns})
      .transpose(1, 2)
      .contiguous();
}

Tensor padded_rows(const Tensor& vector, int64_t rows) {
  return at::constant_pad_nd(vector.to(at::kFloat), {0, rows - vector.size(0)}).contiguous();
}

/// [rows, columns] or [1, columns] of a weight of `rows` rows, with rows of `fill` up to whole panels.
Tensor whole_panels(const Tensor& matrix, int64_t rows, double fill) {
  const Tensor expanded = matrix.expand({rows, matrix.size(1)});
  return at::constant_pad_nd(expanded, {0, 0, 0, rounded_up(rows, kPanelRows) - rows}, fill);
}

/// The rows of all weights, each from the start of a panel on.
QuantizedWeight joined(std::span<const QuantizedWeight* const> weights) {
  QuantizedWeight result{.spec = weights[0]->spec};
  if (result.spec.strategy == Strategy::kTensor) result.spec.strategy = Strategy::kChannel;
  std::vector<Tensor> codes, scales, zero_points;
  for (const QuantizedWeight* weight : weights) {
    const int64_t rows = weight->codes.size(0);
    codes.push_back(whole_panels(weight->codes, rows, 0));
    scales.push_back(whole_panels(weight->qparams.scale, rows, 1));
    if (!result.spec.symmetric) zero_points.push_back(whole_panels(weight->qparams.zero_point, rows, 0));
  }
  result.codes = at::cat(codes);
  result.qparams.scale = at::cat(scales);
  if (!result.spec.symmetric) result.qparams.zero_point = at::cat(zero_points);
  return result;
}

/// Whether panels of both can be one stream.
bool have_one_layout(const QuantizedWeight& a, const QuantizedWeight& b) {
  return a.spec.num_bits == b.spec.num_bits && a.spec.symmetric == b.spec.symmetric &&
         a.spec.scale_dtype == b.spec.scale_dtype && checked_columns(a) == checked_columns(b);
}

/// A copy in the memory of weights.
Tensor beside_weights(const Tensor& t) {
  const Tensor copy = weight_memory(static_cast<int64_t>(t.nbytes()));
  std::memcpy(copy.mutable_data_ptr(), t.const_data_ptr(), t.nbytes());
  return copy.view(t.scalar_type()).view(t.sizes());
}

FactorPanels view_of(const Tensor& factors) {
  return {factors.const_data_ptr(), stored_type(factors.scalar_type()), factors.size(0), factors.size(1)};
}

}  // namespace

const IntegerKernels& integer_kernels() {
  static const IntegerKernels* const kernels = find_integer_kernels();
  TORCH_CHECK(kernels != nullptr, "BASEQ_KERNELS names no instruction set that this processor has");
  return *kernels;
}

PreparedLinear::PreparedLinear(const QuantizedWeight& weight, const LowRankFactors& low_rank, const Tensor& bias)
    : columns_(checked_columns(weight)),
      out_features_(weight.codes.size(0)),
      num_bits_(weight.spec.num_bits),
      has_zero_points_(!weight.spec.symmetric) {
  pack_panels(weight);
  if (low_rank.defined()) pack_low_rank(low_rank);
  if (!bias.defined()) return;
  TORCH_CHECK(bias.device().is_cpu() && bias.sizes() == at::IntArrayRef({out_features_}), "PreparedLinear: bias is ",
              bias.sizes(), ", expected [", out_features_, "] on cpu");
  bias_ = padded_rows(bias, panels_.size(0) * kPanelRows);
}

PreparedLinear::PreparedLinear(std::shared_ptr<const PreparedLinear> joint, int64_t first_row, int64_t out_features)
    : PreparedLinear(*joint) {
  const int64_t rows = rounded_up(out_features, kPanelRows);
  out_features_ = out_features;
  panels_ = panels_.narrow(0, first_row / kPanelRows, rows / kPanelRows);
  row_sums_ = row_sums_.narrow(0, first_row, rows);
  if (bias_.defined()) bias_ = bias_.narrow(0, first_row, rows);
  joint_ = std::move(joint);
  first_row_ = first_row;
}

std::vector<std::shared_ptr<const PreparedLinear>> PreparedLinear::together(
    std::span<const QuantizedWeight* const> weights, std::span<const Tensor> biases) {
  TORCH_CHECK(!weights.empty() && weights.size() == biases.size(), "PreparedLinear: ", weights.size(), " weights and ",
              biases.size(), " biases");
  std::vector<Tensor> padded;
  for (size_t i = 0; i < weights.size(); ++i) {
    const bool fits = have_one_layout(*weights[0], *weights[i]) && biases[i].defined() == biases[0].defined();
    if (!fits) return {};
    if (!biases[i].defined()) continue;
    const int64_t rows = weights[i]->codes.size(0);
    TORCH_CHECK(biases[i].sizes() == at::IntArrayRef({rows}), "PreparedLinear: bias is ", biases[i].sizes(),
                ", expected [", rows, "]");
    padded.push_back(padded_rows(biases[i], rounded_up(rows, kPanelRows)));
  }
  const auto joint = std::make_shared<const PreparedLinear>(joined(weights), LowRankFactors{},
                                                            padded.empty() ? Tensor() : at::cat(padded));
  std::vector<std::shared_ptr<const PreparedLinear>> parts;
  int64_t first_row = 0;
  for (const QuantizedWeight* weight : weights) {
    const int64_t out_features = weight->codes.size(0);
    parts.push_back(std::shared_ptr<const PreparedLinear>(new PreparedLinear(joint, first_row, out_features)));
    first_row += rounded_up(out_features, kPanelRows);
  }
  return parts;
}

void PreparedLinear::pack_panels(const QuantizedWeight& weight) {
  const int64_t groups = columns_.count(), num_panels = rounded_up(out_features_, kPanelRows) / kPanelRows;
  const Tensor codes = weight.codes.contiguous();
  const Tensor scale = weight.qparams.scale.expand({out_features_, groups}).contiguous();
  // Scales are stored in their type, unless that would change them.
  const Tensor narrow = scale.to(weight.spec.scale_dtype);
  if (narrow.to(at::kFloat).equal(scale)) scale_dtype_ = weight.spec.scale_dtype;
  Tensor zeros;
  if (has_zero_points_) {
    const Tensor& stored = weight.qparams.zero_point;
    const Tensor shifted = stored + static_cast<double>(int64_t{1} << (num_bits_ - 1));
    TORCH_CHECK(shifted.eq(shifted.round()).logical_and(shifted.ge(0)).logical_and(shifted.le(255)).all().item<bool>(),
                "PreparedLinear: a zero point is not a whole number of the grid");
    zeros = shifted.expand({out_features_, groups}).to(at::kByte).contiguous();
  }
  const Tensor scale_panels = in_panels(narrow.to(scale_dtype_), groups);
  const Tensor zero_panels = has_zero_points_ ? in_panels(zeros, groups) : Tensor();
  const int64_t scale_bytes = groups * kPanelRows * scale_panels.element_size();
  const int64_t zero_bytes = has_zero_points_ ? groups * kPanelRows : 0;
  const int64_t header = panel_header_bytes(groups, stored_type(scale_dtype_), has_zero_points_);
  const int64_t code_bytes = panel_code_bytes(columns_.padded_columns(), num_bits_);
  panels_ = weight_memory(num_panels * (header + code_bytes)).view({num_panels, header + code_bytes});
  row_sums_ = at::zeros({num_panels * kPanelRows}, at::kFloat);
  auto* sums = row_sums_.mutable_data_ptr<float>();
  at::parallel_for(0, num_panels, 1 + kProductsPerTask / columns_.padded_columns(), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      auto* out = static_cast<uint8_t*>(panels_.mutable_data_ptr()) + p * panels_.size(1);
      const int64_t first = p * kPanelRows, rows = std::min(kPanelRows, out_features_ - first);
      const PanelSource source{codes.const_data_ptr<int8_t>() + first * columns_.features, rows, columns_.features,
                               columns_.group_size, num_bits_};
      pack_panel_codes(source, out + header);
      std::memcpy(out, static_cast<const char*>(scale_panels.const_data_ptr()) + p * scale_bytes, scale_bytes);
      if (zero_bytes > 0) {
        std::memcpy(out + scale_bytes, zero_panels.const_data_ptr<uint8_t>() + p * zero_bytes, zero_bytes);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (first + r) * groups;
        sums[first + r] = weight_row_sum(source, r, scale.const_data_ptr<float>() + at,
                                         has_zero_points_ ? zeros.const_data_ptr<uint8_t>() + at : nullptr);
      }
    }
  });
}

void PreparedLinear::pack_low_rank(const LowRankFactors& low_rank) {
  const auto& [A, B, A_scale, B_scale] = low_rank;
  TORCH_CHECK(A.dim() == 2 && A.size(1) == columns_.features && B.defined() && A.scalar_type() == B.scalar_type() &&
                  B.sizes() == at::IntArrayRef({out_features_, A.size(0)}),
              "PreparedLinear: the factors of the correction are ", A.sizes(), " and ",
              B.defined() ? B.sizes() : at::IntArrayRef{}, ", expected [rank, ", columns_.features, "] and [",
              out_features_, ", rank] of one type");
  const int64_t rank = A.size(0), padded_rank = rounded_up(rank, kPanelRows);
  const Tensor grouped = at::constant_pad_nd(A.reshape({rank, columns_.count(), columns_.group_size}),
                                             {0, columns_.padded_group() - columns_.group_size});
  down_ = beside_weights(in_panels(grouped.reshape({rank, -1}), columns_.padded_columns()));
  up_ = beside_weights(in_panels(B, padded_rank));
  if (stored_type(A.scalar_type()) != StoredType::kInt8) return;
  TORCH_CHECK(A_scale.defined() && B_scale.defined() && A_scale.numel() == rank && B_scale.numel() == rank,
              "PreparedLinear: int8 factors have no scales [", rank, "]");
  rank_scale_ = padded_rows(A_scale.reshape(-1) * B_scale.reshape(-1), padded_rank);
}

WeightPanels PreparedLinear::panels() const {
  WeightPanels result{.panels = panels_.const_data_ptr<uint8_t>(),
                      .panel_bytes = panels_.size(1),
                      .num_panels = panels_.size(0),
                      .num_bits = num_bits_,
                      .out_features = out_features_,
                      .groups = columns_.count(),
                      .group_columns = columns_.padded_group(),
                      .scale_type = stored_type(scale_dtype_),
                      .zero_points = has_zero_points_,
                      .zero_point = 1 << (num_bits_ - 1),
                      .row_sums = row_sums_.const_data_ptr<float>(),
                      .bias = bias_.defined() ? bias_.const_data_ptr<float>() : nullptr};
  if (up_.defined()) result.up = view_of(up_);
  return result;
}

/// t = A x, float32 [rows, padded rank].
Tensor PreparedLinear::project(const Activations& x, const IntegerKernels& kernels) const {
  const int64_t rank = up_.size(1), columns = columns_.padded_columns();
  const Tensor values = x.padded_values();
  const Tensor t = at::empty({x.rows(), rank}, at::kFloat);
  at::parallel_for(0, x.rows(), 1 + kProductsPerTask / (columns * rank), [&](int64_t begin, int64_t end) {
    kernels.project(view_of(down_), values.const_data_ptr<float>() + begin * columns, end - begin,
                    t.mutable_data_ptr<float>() + begin * rank);
  });
  return rank_scale_.defined() ? t * rank_scale_ : t;
}

Tensor PreparedLinear::forward(const Activations& x, const IntegerKernels& kernels) const {
  TORCH_CHECK(x.columns == columns_, "PreparedLinear: activations are quantized for ", x.columns.features,
              " features in groups of ", x.columns.group_size, ", expected ", columns_.features, " in groups of ",
              columns_.group_size);
  Tensor y = at::detail::empty_cpu({x.rows(), out_features_}, at::kFloat);
  if (x.rows() == 0) return y;
  const Tensor projected = up_.defined() ? project(x, kernels) : Tensor();
  const CodeRows rows{.rows = x.rows(),
                      .planes = x.planes(),
                      .max_code = x.num_bits <= 4 ? 15 : 128,
                      .codes = x.codes.const_data_ptr<int8_t>(),
                      .sums = x.sums.const_data_ptr<int32_t>(),
                      .scale = x.scale.const_data_ptr<float>(),
                      .scales_per_row = x.scale.size(1),
                      .base = x.base.defined() ? x.base.const_data_ptr<float>() : nullptr,
                      .projected = projected.defined() ? projected.const_data_ptr<float>() : nullptr};
  const WeightPanels weights = panels();
  auto* out = y.mutable_data_ptr<float>();
  const int64_t products = columns_.padded_columns() * kPanelRows * x.rows();
  at::parallel_for(0, weights.num_panels, 1 + kProductsPerTask / products, [&](int64_t begin, int64_t end) {
    const Tensor scratch = at::detail::empty_cpu({scratch_bytes(weights, rows)}, at::kByte);
    kernels.multiply(weights, rows, begin, end, scratch.mutable_data_ptr(), out);
  });
  return y;
}

int64_t PreparedLinear::bytes() const {
  int64_t total = 0;
  for (const Tensor& t : {panels_, row_sums_, bias_, down_, up_, rank_scale_}) {
    if (t.defined()) total += static_cast<int64_t>(t.nbytes());
  }
  return total;
}

}  // namespace baseq
