#pragma once

#include "activations.h"
#include "integer_kernels.h"

namespace baseq {

/// The keys of one head of one sequence as codes, in the layout of weights: tokens are the rows of a panel.
class KeyPanels {
 public:
  /// @param spec      dynamic, one scale per token, 2 to 8 bits
  /// @param capacity  tokens at most
  KeyPanels(int64_t head_dim, const QuantSpec& spec, int64_t capacity);

  int64_t length() const { return length_; }
  /// Quantizes tokens and adds them at the end.
  /// @param keys  [tokens, head_dim]
  void append(const Tensor& keys, double clip = 1);

  /// The groups by which queries have to be quantized.
  ColumnGroups columns() const { return {head_dim_, head_dim_}; }
  /// The dot products of queries with all keys, float32 [rows, length()], exact sums rounded as docs/arithmetic.md
  /// says.
  /// @param queries  of fixed_point_rows
  Tensor scores(const Activations& queries, const IntegerKernels& kernels) const;

 private:
  int64_t head_dim_, capacity_, length_ = 0;
  QuantSpec spec_;
  Tensor panels_;  ///< uint8 [panels, bytes], see WeightPanels; float32 scales
  Tensor base_;    ///< float32 [panels, 4, 16], base in the first row, zeros in the others
};

}  // namespace baseq
