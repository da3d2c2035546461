#include "activations.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>

#include "../quant/grid.h"
#include "integer_kernels.h"
#include "rounding.h"

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

/// Uninitialized, but for the padding.
Activations empty_rows(int64_t rows, int64_t planes, int64_t scales, int64_t num_bits, const ColumnGroups& columns) {
  Activations result{.columns = columns,
                     .num_bits = num_bits,
                     .codes = at::detail::empty_cpu({rows, planes, columns.padded_columns()}, at::kChar),
                     .sums = at::detail::empty_cpu({rows, planes, columns.count()}, at::kInt),
                     .scale = at::detail::empty_cpu({rows, scales}, at::kFloat)};
  if (columns.padded_columns() != columns.features) result.codes.zero_();
  return result;
}

/// Codes of `planes` planes, `stride` apart, of a group that has values that are not finite.
void clear_codes(int8_t* codes, int64_t size, int64_t planes, int64_t stride) {
  for (int64_t plane = 0; plane < planes; ++plane) std::fill_n(codes + plane * stride, size, int8_t{0});
}

/// Fixed-point codes of n values, in one plane or, where `second` is not null, in two.
__attribute__((target_clones("avx512f", "avx2", "default"))) void round_to_fixed_point(const float* values, int64_t n,
                                                                                       float step, float limit,
                                                                                       int8_t* first, int8_t* second,
                                                                                       int32_t* sums) {
  int32_t first_sum = 0, second_sum = 0;
  const int32_t shift = second != nullptr ? 7 : 0;
  for (int64_t i = 0; i < n; ++i) {
    float position = round_to_even(values[i] / step);
    position = position < -limit ? -limit : position;
    position = position > limit ? limit : position;
    const int32_t code = static_cast<int32_t>(position) >> shift;
    first[i] = static_cast<int8_t>(code);
    first_sum += code;
  }
  for (int64_t i = 0; second != nullptr && i < n; ++i) {
    float position = round_to_even(values[i] / step);
    position = position < -limit ? -limit : position;
    position = position > limit ? limit : position;
    const int32_t code = static_cast<int32_t>(position) & 127;
    second[i] = static_cast<int8_t>(code);
    second_sum += code;
  }
  sums[0] = first_sum;
  sums[1] = second_sum;
}

__attribute__((target_clones("avx512f", "avx2", "default"))) void values_of_codes(const int8_t* first,
                                                                                  const int8_t* second, int64_t n,
                                                                                  float scale, float base, float* out) {
  if (second == nullptr) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(first[i]) * scale + base;
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(128 * first[i] + second[i]) * scale + base;
  }
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

Tensor Activations::padded_values() const {
  const int64_t groups = columns.count(), padded = columns.padded_group(), width = columns.padded_columns();
  const Tensor values = at::zeros({rows(), width}, at::kFloat);
  const auto* stored = codes.const_data_ptr<int8_t>();
  const auto* scales = scale.const_data_ptr<float>();
  auto* out = values.mutable_data_ptr<float>();
  at::parallel_for(0, rows(), 1 + kValuesPerTask / width, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float low = base.defined() ? base.const_data_ptr<float>()[row] : 0;
      for (int64_t group = 0; group < groups; ++group) {
        const int8_t* first = stored + row * planes() * width + group * padded;
        const int8_t* second = planes() == 2 ? first + width : nullptr;
        const float step = scales[scale.size(1) == 1 ? row : row * groups + group];
        values_of_codes(first, second, columns.group_size, step, low, out + row * width + group * padded);
      }
    }
  });
  return values;
}

Tensor Activations::dequantized() const {
  return padded_values()
      .view({rows(), columns.count(), columns.padded_group()})
      .narrow(2, 0, columns.group_size)
      .reshape({rows(), columns.features});
}

Activations quantize_rows(const Tensor& x, const ColumnGroups& columns, const QuantSpec& spec, double clip) {
  check_spec("quantize_rows", spec);
  check_input("quantize_rows", x, columns);
  TORCH_CHECK(spec.dynamic && spec.strategy == Strategy::kToken, "quantize_rows: expected a dynamic grid per token");
  const Tensor input = x.to(at::kFloat).contiguous();
  Activations result = empty_rows(x.size(0), 1, 1, spec.num_bits, columns);
  if (!spec.symmetric) result.base = at::detail::empty_cpu({x.size(0)}, at::kFloat);
  // Codes of asymmetric grids count from 0; eight bits of them are stored with 128 subtracted.
  const float offset = !spec.symmetric && spec.num_bits == 8 ? 128 : 0;
  auto* codes = result.codes.mutable_data_ptr<int8_t>();
  auto* scale = result.scale.mutable_data_ptr<float>();
  auto* base = spec.symmetric ? nullptr : result.base.mutable_data_ptr<float>();
  auto* sums = result.sums.mutable_data_ptr<int32_t>();
  const int64_t size = columns.group_size, padded = columns.padded_group(), groups = columns.count();
  for_each_row(input, [&](int64_t row, const float* values) {
    const bool finite = all_finite(values, columns.features);
    const Grid grid = grid_over(find_range(values, columns.features), static_cast<float>(clip), spec).grid;
    scale[row] = finite ? grid.scale : std::numeric_limits<float>::quiet_NaN();
    if (base != nullptr) base[row] = grid.base + offset * grid.scale;
    for (int64_t group = 0; group < groups; ++group) {
      int8_t* out = codes + row * columns.padded_columns() + group * padded;
      if (!finite) clear_codes(out, size, 1, 0);
      sums[row * groups + group] = finite ? round_to_grid(values + group * size, size, grid, offset, out) : 0;
    }
  });
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
  auto* sums = result.sums.mutable_data_ptr<int32_t>();
  for_each_row(input, [&](int64_t row, const float* values) {
    for (int64_t group = 0; group < groups; ++group, values += size) {
      int8_t* first = codes + row * planes * columns.padded_columns() + group * padded;
      const Extremes range = find_range(values, size);
      const bool finite = all_finite(values, size);
      const float step = std::max(std::max(range.high, -range.low) / limit, FLT_MIN);
      scale[row * groups + group] = finite ? step : std::numeric_limits<float>::quiet_NaN();
      int32_t of_planes[2] = {};
      if (finite) {
        int8_t* second = planes == 2 ? first + columns.padded_columns() : nullptr;
        round_to_fixed_point(values, size, step, limit, first, second, of_planes);
      } else {
        clear_codes(first, size, planes, columns.padded_columns());
      }
      for (int64_t plane = 0; plane < planes; ++plane) sums[(row * planes + plane) * groups + group] = of_planes[plane];
    }
  });
  return result;
}

}  // namespace baseq
