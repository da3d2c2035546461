#pragma once

#include "baseq/quant/quantize.h"

namespace baseq {

/// Columns [begin, end) of GPTQ, in the order in which they are rounded. float32 and contiguous throughout.
struct GptqBlock {
  const Tensor& target;     ///< [rows, columns], the weights to be approximated
  const Tensor& corrected;  ///< [rows, columns], target plus what earlier blocks left to make up for
  const Tensor& feedback;   ///< [columns, columns], unit upper triangular
  const QParams& qparams;   ///< [rows, groups]
  const QuantSpec& spec;
  const Tensor& column_order;  ///< int64 [columns], where each column stands in the weight
  int64_t group_size = 0;      ///< columns of the weight that share a scale
  int64_t begin = 0, end = 0;
};

/// Writes the codes of the block's columns into `codes` (int8 [rows, columns]) and target - value into `errors`
/// ([rows, end - begin], any row stride).
void round_block(const GptqBlock& block, const Tensor& codes, const Tensor& errors);

}  // namespace baseq
