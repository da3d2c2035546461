#include "key_panels.h"

#include <ATen/ATen.h>

#include <cstring>

#include "weight_layout.h"

namespace baseq {
namespace {

// The base of a key times the sum of a query is a low-rank correction of rank 1, padded to what the kernels take.
constexpr int64_t kRank = 4;

/// The stored code minus the signed one of quantize_rows; also the zero point of stored codes.
int32_t offset_of(const QuantSpec& spec) { return spec.symmetric || spec.num_bits == 8 ? 1 << (spec.num_bits - 1) : 0; }

int64_t code_bytes(const ColumnGroups& columns, int64_t num_bits) {
  return columns.padded_columns() / kChunkColumns * num_bits * kBlockBytes;
}

/// The sum of each row of queries, float32 [rows, kRank], zeros after the first.
Tensor query_sums(const Activations& queries) {
  const Tensor sums = at::zeros({queries.rows(), kRank}, at::kFloat);
  const int64_t planes = queries.planes();
  const auto* codes = queries.sums.const_data_ptr<int32_t>();
  const auto* scale = queries.scale.const_data_ptr<float>();
  for (int64_t row = 0; row < queries.rows(); ++row) {
    const int32_t* of_row = codes + row * planes;
    const int32_t whole = planes == 2 ? 128 * of_row[0] + of_row[1] : of_row[0];
    sums.mutable_data_ptr<float>()[row * kRank] = static_cast<float>(whole) * scale[row];
  }
  return sums;
}

}  // namespace

KeyPanels::KeyPanels(int64_t head_dim, const QuantSpec& spec, int64_t capacity)
    : head_dim_(head_dim), capacity_(capacity), spec_(spec) {
  TORCH_CHECK(head_dim > 0 && head_dim <= kMaxGroupColumns && capacity > 0, "KeyPanels: heads of ", head_dim,
              " features for ", capacity, " tokens, expected 1 to ", kMaxGroupColumns, " features and a token");
  TORCH_CHECK(spec.dynamic && spec.strategy == Strategy::kToken, "KeyPanels: expected a dynamic grid per token");
  const int64_t num_panels = (capacity + kPanelRows - 1) / kPanelRows;
  const int64_t scale_bytes = kPanelRows * int64_t{sizeof(float)};
  panels_ = at::zeros({num_panels, code_bytes(columns(), spec.num_bits) + scale_bytes}, at::kByte);
  base_ = at::zeros({num_panels, kRank, kPanelRows}, at::kFloat);
}

void KeyPanels::append(const Tensor& keys, double clip) {
  const Activations quantized = quantize_rows(keys, columns(), spec_, clip);
  TORCH_CHECK(length_ + quantized.rows() <= capacity_, "KeyPanels: ", length_ + quantized.rows(),
              " tokens, but there is room for ", capacity_);
  const int32_t offset = offset_of(spec_);
  const int64_t scales = code_bytes(columns(), spec_.num_bits);
  for (int64_t i = 0; i < quantized.rows(); ++i, ++length_) {
    const int64_t panel = length_ / kPanelRows, row = length_ % kPanelRows;
    auto* bytes = panels_.mutable_data_ptr<uint8_t>() + panel * panels_.size(1);
    const int8_t* codes = quantized.codes.const_data_ptr<int8_t>() + i * columns().padded_columns();
    set_row_codes(codes, head_dim_, spec_.num_bits, offset, row, bytes);
    std::memcpy(bytes + scales + row * int64_t{sizeof(float)}, quantized.scale.const_data_ptr<float>() + i,
                sizeof(float));
    if (!quantized.base.defined()) continue;
    base_.mutable_data_ptr<float>()[panel * kRank * kPanelRows + row] = quantized.base.const_data_ptr<float>()[i];
  }
}

Tensor KeyPanels::scores(const Activations& queries, const IntegerKernels& kernels) const {
  TORCH_CHECK(queries.columns == columns() && !queries.base.defined(),
              "KeyPanels: expected fixed-point queries of heads of ", head_dim_);
  const Tensor y = at::empty({queries.rows(), length_}, at::kFloat);
  if (y.numel() == 0) return y;
  WeightPanels weights{.panels = panels_.const_data_ptr<uint8_t>(),
                       .panel_bytes = panels_.size(1),
                       .num_panels = (length_ + kPanelRows - 1) / kPanelRows,
                       .num_bits = spec_.num_bits,
                       .out_features = length_,
                       .groups = 1,
                       .group_columns = columns().padded_group(),
                       .scale_type = StoredType::kFloat,
                       .zero_point = offset_of(spec_)};
  Tensor sums;
  if (!spec_.symmetric) {
    sums = query_sums(queries);
    weights.up = {base_.const_data_ptr(), StoredType::kFloat, base_.size(0), kRank};
  }
  const CodeRows rows{.rows = queries.rows(),
                      .planes = queries.planes(),
                      .max_code = 128,
                      .codes = queries.codes.const_data_ptr<int8_t>(),
                      .sums = queries.sums.const_data_ptr<int32_t>(),
                      .scale = queries.scale.const_data_ptr<float>(),
                      .projected = sums.defined() ? sums.const_data_ptr<float>() : nullptr};
  const Tensor scratch = at::empty({scratch_bytes(weights)}, at::kByte);
  kernels.multiply(weights, rows, 0, weights.num_panels, scratch.mutable_data_ptr(), y.mutable_data_ptr<float>());
  return y;
}

}  // namespace baseq
