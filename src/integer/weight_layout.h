#pragma once

#include <cstdint>

/// Repacks a quantized weight into the panels of integer_kernels.h. No LibTorch.
namespace baseq {

/// Rows of a panel as signed codes [rows, features] in [-2^(b-1), 2^(b-1) - 1].
struct PanelSource {
  const int8_t* codes;
  int64_t rows;  ///< at most kPanelRows
  int64_t features, group_size, num_bits;
};

/// Writes the chunks of a panel. Missing rows and columns become code 0 of the unsigned grid.
void pack_panel_codes(const PanelSource& source, uint8_t* out);

/// The sum of the weights of a row: exact integers per group, their products with the scales added in float64 in the
/// order of the groups, rounded to float32 at the end.
/// @param scale        [groups]
/// @param zero_points  [groups], or null: 2^(b-1)
float weight_row_sum(const PanelSource& source, int64_t row, const float* scale, const uint8_t* zero_points);

}  // namespace baseq
