#pragma once

#include <map>
#include <optional>
#include <string>

#include "baseq/quant/gptq.h"
#include "baseq/transform/transform.h"

namespace baseq {

/// Embedding or head of the output, [vocab_size, hidden_size].
struct VocabularyTable {
  Tensor values{};                         ///< undefined when there are codes
  std::optional<QuantizedWeight> codes{};  ///< on the CPU

  /// Rows by token, [..., hidden_size].
  Tensor rows(const Tensor& ids) const;
  /// As a checkpoint stores them, by full name.
  std::map<std::string, Tensor> tensors(const std::string& name) const;
};

/// @param matrix       as the checkpoint has it
/// @param column_gain  may be undefined
/// @param transform    in float64, of the rows
/// @param grid         rounded to nearest; absent: the table is rounded to `dtype`
VocabularyTable make_table(const Tensor& matrix, const Tensor& column_gain, const Transform& transform,
                           const std::optional<QuantSpec>& grid, at::ScalarType dtype);

}  // namespace baseq
