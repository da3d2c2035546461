#include "activations.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>

#include "../quant/grid.h"
#include "integer_kernels.h"

namespace baseq {
namespace {

constexpr int64_t kValuesPerTask = 1 << 14;

void check_input(const char* who, const Tensor& x, const ColumnGroups& columns) {
  TORCH_CHECK(columns.group_size > 0 && columns.features % columns.group_size == 0, who, ": groups of ",
              columns.group_size, " do not divide ", columns.features, " features");
  TORCH_CHECK(
      x.device().is_cpu() && at::isFloatingType(x.scalar_type()) && x.dim() == 2 && x.size(1) == columns.features, who,
      ": x is ", x.scalar_type(), " ", x.sizes(), " on ", x.device(), ", expected floating [rows, ", columns.features,
      "] on cpu");
}

Activations empty_rows(int64_t rows, int64_t planes, int64_t scales, int64_t num_bits, const ColumnGroups& columns) {
  return {.columns = columns,
          .num_bits = num_bits,
          .codes = at::zeros({rows, planes, columns.padded_columns()}, at::kChar),
          .sums = at::empty({rows, planes, columns.count()}, at::kInt),
          .scale = at::empty({rows, scales}, at::kFloat)};
}

bool all_finite(const float* values, int64_t n) {
  int64_t finite = 0;
  for (int64_t i = 0; i < n; ++i) finite += std::abs(values[i]) <= FLT_MAX ? 1 : 0;
  return finite == n;
}

/// Rounds to the nearest whole number, halves to even; |value| < 2^22.
float round_to_even(float value) {
  constexpr float kRounder = 12582912.0F;  // 1.5 * 2^23, whose last bit is worth 1
  return (value + kRounder) - kRounder;
}

void sum_codes(Activations& x) {
  const int64_t group = x.columns.padded_group(), count = x.sums.numel();
  const auto* codes = x.codes.const_data_ptr<int8_t>();
  auto* sums = x.sums.mutable_data_ptr<int32_t>();
  at::parallel_for(0, count, 1 + kValuesPerTask / group, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int32_t sum = 0;
      for (int64_t k = 0; k < group; ++k) sum += codes[i * group + k];
      sums[i] = sum;
    }
  });
}

template <class Fn>
void for_each_row(const Tensor& x, const Fn& quantize) {
  const int64_t features = x.size(1);
  const auto* values = x.const_data_ptr<float>();
  at::parallel_for(0, x.size(0), 1 + kValuesPerTask / features, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) quantize(row, values + row * features);
  });
}

}  // namespace

int64_t ColumnGroups::padded_group() const { return (group_size + kChunkColumns - 1) / kChunkColumns * kChunkColumns; }

Tensor Activations::dequantized() const {
  const auto whole = codes.to(at::kFloat).view({rows(), planes(), columns.count(), columns.padded_group()});
  Tensor values = planes() == 1 ? whole.select(1, 0) : whole.select(1, 0) * 128 + whole.select(1, 1);
  values = values.narrow(2, 0, columns.group_size).contiguous();
  auto* out = values.mutable_data_ptr<float>();
  const auto* scales = scale.const_data_ptr<float>();
  const int64_t groups = columns.count(), size = columns.group_size;
  for (int64_t row = 0; row < rows(); ++row) {
    const float low = base.defined() ? base.const_data_ptr<float>()[row] : 0;
    for (int64_t group = 0; group < groups; ++group, out += size) {
      const float step = scales[scale.size(1) == 1 ? row : row * groups + group];
      for (int64_t k = 0; k < size; ++k) out[k] = out[k] * step + low;
    }
  }
  return values.view({rows(), columns.features});
}

Activations quantize_rows(const Tensor& x, const ColumnGroups& columns, const QuantSpec& spec, double clip) {
  check_spec("quantize_rows", spec);
  check_input("quantize_rows", x, columns);
  TORCH_CHECK(spec.dynamic && spec.strategy == Strategy::kToken, "quantize_rows: expected a dynamic grid per token");
  const Tensor input = x.to(at::kFloat).contiguous();
  Activations result = empty_rows(x.size(0), 1, 1, spec.num_bits, columns);
  if (!spec.symmetric) result.base = at::empty({x.size(0)}, at::kFloat);
  // Codes of asymmetric grids count from 0; eight bits of them are stored with 128 subtracted.
  const float offset = !spec.symmetric && spec.num_bits == 8 ? 128 : 0;
  auto* codes = result.codes.mutable_data_ptr<int8_t>();
  auto* scale = result.scale.mutable_data_ptr<float>();
  auto* base = spec.symmetric ? nullptr : result.base.mutable_data_ptr<float>();
  const int64_t size = columns.group_size, padded = columns.padded_group(), groups = columns.count();
  for_each_row(input, [&](int64_t row, const float* values) {
    const bool finite = all_finite(values, columns.features);
    const Grid grid = grid_over(find_range(values, columns.features), static_cast<float>(clip), spec).grid;
    scale[row] = finite ? grid.scale : std::numeric_limits<float>::quiet_NaN();
    if (base != nullptr) base[row] = grid.base + offset * grid.scale;
    if (!finite) return;
    for (int64_t group = 0; group < groups; ++group) {
      int8_t* out = codes + row * columns.padded_columns() + group * padded;
      for (int64_t k = 0; k < size; ++k) {
        float position = (values[group * size + k] - grid.base) / grid.scale;
        position = position < grid.low ? grid.low : position;
        position = position > grid.high ? grid.high : position;
        out[k] = static_cast<int8_t>(round_to_even(position) - offset);
      }
    }
  });
  sum_codes(result);
  return result;
}

Activations fixed_point_rows(const Tensor& x, const ColumnGroups& columns, int64_t num_bits) {
  check_input("fixed_point_rows", x, columns);
  TORCH_CHECK(num_bits == 8 || num_bits == 15, "fixed_point_rows: num_bits is ", num_bits, ", expected 8 or 15");
  const Tensor input = x.to(at::kFloat).contiguous();
  const int64_t planes = num_bits == 15 ? 2 : 1, size = columns.group_size, padded = columns.padded_group();
  const int64_t groups = columns.count();
  Activations result = empty_rows(x.size(0), planes, groups, num_bits, columns);
  const float limit = num_bits == 15 ? 16383 : 127;
  auto* codes = result.codes.mutable_data_ptr<int8_t>();
  auto* scale = result.scale.mutable_data_ptr<float>();
  for_each_row(input, [&](int64_t row, const float* values) {
    for (int64_t group = 0; group < groups; ++group, values += size) {
      int8_t* first = codes + row * planes * columns.padded_columns() + group * padded;
      int8_t* second = first + columns.padded_columns();
      float largest = 0;
      for (int64_t k = 0; k < size; ++k) largest = std::max(largest, std::abs(values[k]));
      const bool finite = all_finite(values, size);
      const float step = std::max(largest / limit, FLT_MIN);
      scale[row * groups + group] = finite ? step : std::numeric_limits<float>::quiet_NaN();
      for (int64_t k = 0; finite && k < size; ++k) {
        const auto code = static_cast<int32_t>(std::clamp(round_to_even(values[k] / step), -limit, limit));
        first[k] = static_cast<int8_t>(planes == 2 ? code >> 7 : code);
        if (planes == 2) second[k] = static_cast<int8_t>(code & 127);
      }
    }
  });
  sum_codes(result);
  return result;
}

}  // namespace baseq
