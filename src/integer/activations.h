#pragma once

#include "baseq/quant/quantize.h"

namespace baseq {

/// The columns of a linear's input in groups, each padded to whole chunks of the kernels' layout.
struct ColumnGroups {
  int64_t features = 0;
  int64_t group_size = 0;  ///< divides `features`

  int64_t count() const { return features / group_size; }
  int64_t padded_group() const;
  int64_t padded_columns() const { return count() * padded_group(); }
  bool operator==(const ColumnGroups&) const = default;
};

/// Rows of activations as integer codes: value = code * scale + base.
struct Activations {
  ColumnGroups columns;
  int64_t num_bits = 8;  ///< 2 to 8, or 15: codes are 128 * first plane + second plane
  Tensor codes;          ///< int8 [rows, planes, padded columns], zeros as padding
  Tensor sums;           ///< int32 [rows, planes, groups], sums of codes
  Tensor scale;          ///< float32 [rows, 1] or [rows, groups]
  Tensor base;           ///< float32 [rows], or undefined: 0

  int64_t rows() const { return codes.size(0); }
  int64_t planes() const { return codes.size(1); }
  /// float32 [rows, features]
  Tensor dequantized() const;
  /// The same in groups with their padding, zeros there: float32 [rows, padded columns].
  Tensor padded_values() const;
};

/// The codes that fake_quantize_dynamic rounds to, one scale per row.
/// @param x     [rows, features]
/// @param spec  dynamic, 2 to 8 bits
/// @param clip  see compute_qparams
/// A row with a value that is not finite has the scale NaN, and so do its products.
Activations quantize_rows(const Tensor& x, const ColumnGroups& columns, const QuantSpec& spec, double clip = 1);

/// Fixed-point numbers for linears whose inputs are not quantized: symmetric, one scale per row and group, 8 or 15
/// bits. 15 bits keep x to 1 / 32766 of the largest magnitude of its group.
Activations fixed_point_rows(const Tensor& x, const ColumnGroups& columns, int64_t num_bits);

}  // namespace baseq
