#pragma once

#include "baseq/quant/quantize.h"

namespace baseq {

/// Rows of a weight do not depend on one another: this many go side by side.
inline constexpr int64_t kRowsInStrip = 64;

/// Consecutive columns of GPTQ in the order in which they are rounded, [columns, rows]: one behind the other, with rows
/// a multiple of kRowsInStrip. float32 and, but for `feedback`, contiguous; all on one device.
struct GptqBlock {
  Tensor target;     ///< [width, rows]: the weights to be approximated; becomes what is left of them, target - value
  Tensor corrected;  ///< [width, rows]: with what earlier blocks left to make up for
  Tensor feedback;   ///< [width, width], row j: what an error in column i < j adds to column j. Any row stride
  Tensor codes;      ///< int8 [width, rows], written
  QParams qparams;   ///< [groups, rows]
  Tensor groups;     ///< int64 [width], of each column
  Tensor pivots, added;     ///< [width], see InputFactor
  float low = 0, high = 0;  ///< the codes
  float first_order = 0;    ///< FOEM's beta, see round_block
};

/// Rounds the columns of a block. Adds to losses[s], for each strip of rows, the sum over its rows and the columns of
/// pivot * (corrected - value)^2 - added * (target - value)^2: over all columns the error of the output, tr(D H D^T).
///
/// With `first_order` b the loss means nothing and, D = corrected - target, the rounded weight is target + (1 - b) D
/// and what is left of it target - value - (1 - (1 - b)^2) D. That is FOEM (arXiv 2507.11017) in the form with the
/// inverse of H where, before a column is rounded, W -= b (W - W0) in it, and the error that later columns make up for
/// is (W - Q(W)) - b (W - W0).
/// @param losses float64 [rows / kRowsInStrip]; elsewhere than on the CPU all is added to the first
void round_block(const GptqBlock& block, const Tensor& losses);

}  // namespace baseq
