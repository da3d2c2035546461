#pragma once

#include <functional>
#include <vector>

#include "baseq/model/decoder_layer.h"

namespace baseq {

/// Blocks one after the other, each made when it is its turn.
struct BlockChain {
  int64_t num_blocks = 0;
  /// The block at an index. `again`: it was asked for by the same forward pass before, and has to be the same.
  std::function<DecoderLayer(int64_t block, bool again)> build;
  const RotaryEmbedding& rope;
  std::function<void()> before_block{};  ///< called before each block that runs; may be empty

  /// x [batch, seq, hidden_size] after all blocks, without gradients.
  /// @param inputs gets the input of each block; may be null
  Tensor forward(const Tensor& x, std::vector<Tensor>* inputs = nullptr) const;

  struct AtEnd {
    double loss = 0;
    Tensor gradient;  ///< with respect to the stream after the last block
  };
  /// Adds the gradients of a loss to all leaves that the blocks depend on, and returns the loss. A forward pass keeps
  /// the input of every block; then each block, from the last to the first, runs again with a graph (arXiv 1604.06174):
  /// memory is that of one block and of the inputs. A loss that is not finite has no gradients.
  double backward(const Tensor& x, const std::function<AtEnd(const Tensor& hidden)>& loss) const;
};

}  // namespace baseq
