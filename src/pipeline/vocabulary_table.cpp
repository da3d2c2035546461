#include "vocabulary_table.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "model/quantized_linear.h"

namespace baseq {
namespace {

/// Rows that are rotated in float64 or rounded at a time.
constexpr int64_t kTableRowsPerChunk = 4096;

}  // namespace

Tensor VocabularyTable::rows(const Tensor& ids) const {
  if (!codes) return at::embedding(values, ids.to(values.device()));
  std::vector<int64_t> sizes = ids.sizes().vec();
  sizes.push_back(codes->codes.size(1));
  return select_rows(*codes, ids.flatten().to(codes->codes.device())).dequantized().view(sizes);
}

std::map<std::string, Tensor> VocabularyTable::tensors(const std::string& name) const {
  if (codes) return quantized_weight_tensors(name, *codes);
  return {{name + ".weight", values.cpu()}};
}

VocabularyTable make_table(const Tensor& matrix, const Tensor& column_gain, const Transform& transform,
                           const std::optional<QuantSpec>& grid, at::ScalarType dtype) {
  if (transform.empty() && !grid) return {matrix.to(dtype), std::nullopt};
  VocabularyTable table;
  if (!grid) table.values = at::empty(matrix.sizes(), matrix.options().dtype(dtype));
  std::vector<Tensor> codes, scales, zero_points;
  for (int64_t begin = 0; begin < matrix.size(0); begin += kTableRowsPerChunk) {
    const int64_t rows = std::min(kTableRowsPerChunk, matrix.size(0) - begin);
    Tensor chunk = matrix.narrow(0, begin, rows);
    if (!transform.empty()) {
      chunk = chunk.to(at::kDouble);
      if (column_gain.defined()) chunk = chunk * column_gain;
      chunk = apply_transform(transform, chunk);
    }
    if (!grid) {
      table.values.narrow(0, begin, rows).copy_(chunk);
      continue;
    }
    const QuantizedWeight rounded = round_to_nearest(chunk.to(at::kFloat), *grid, /*mse_clip=*/false);
    codes.push_back(rounded.codes);
    scales.push_back(rounded.qparams.scale);
    if (rounded.qparams.zero_point.defined()) zero_points.push_back(rounded.qparams.zero_point);
  }
  if (!grid) return table;
  table.codes = QuantizedWeight{.spec = *grid, .codes = at::cat(codes), .qparams = {.scale = at::cat(scales)}};
  if (!zero_points.empty()) table.codes->qparams.zero_point = at::cat(zero_points);
  return table;
}

}  // namespace baseq
