#pragma once

#include "baseq/model/decoder_layer.h"
#include "baseq/pipeline/recipe.h"

namespace baseq {

/// Rows of logits held at a time, of which there are up to four: 256 x 128k x float32 is 128 MiB.
inline constexpr int64_t kRowsOfLogits = 256;

/// What makes logits of the residual stream after the last block. The products are in the dtype of the weight.
struct Head {
  RmsNorm norm;
  Tensor weight;         ///< [vocab_size, hidden_size]
  Tensor norm_factor{};  ///< [hidden_size], times the weight of the norm; undefined: 1

  Tensor normed(const Tensor& hidden) const;
  /// [rows, hidden_size] -> [rows, vocab_size], in the dtype of `hidden`.
  Tensor logits(const Tensor& hidden) const;
};

/// A loss of a model's predictions, and its gradient in closed form: the logits of all rows at once, and a graph of
/// them, would be the largest thing in memory.
class HeadLoss {
 public:
  /// Mean over the rows that count.
  struct Value {
    double loss = 0;
    Tensor gradient;  ///< with respect to `hidden`, which it is shaped like
  };

  /// Both heads must outlive this.
  /// @param loss  one at the head
  /// @param top_k of kKlTop; at most the size of the vocabulary counts
  HeadLoss(LearnStep::Loss loss, int64_t top_k, const Head& student, const Head& teacher);

  /// Also adds the gradient of the student's norm_factor, if it is a leaf that requires one.
  /// @param hidden  [rows, hidden_size], the stream after the last block
  /// @param teacher the same of the full-precision model; kCrossEntropy does not look at it
  /// @param next    int64 [rows], the token that follows, -1 where none does; only kCrossEntropy looks at it
  Value with_gradient(const Tensor& hidden, const Tensor& teacher, const Tensor& next) const;
  double value(const Tensor& hidden, const Tensor& teacher, const Tensor& next) const;

 private:
  /// Summed over rows; the first logits are overwritten with the gradient of the sum.
  double term(Tensor& logits, const Tensor& teacher, const Tensor& next) const;
  double count(const Tensor& next) const;
  double mean(const Tensor& hidden, const Tensor& teacher, const Tensor& next, Tensor* gradient) const;

  LearnStep::Loss loss_;
  int64_t top_k_;
  const Head& student_;
  const Head& teacher_;
};

}  // namespace baseq
