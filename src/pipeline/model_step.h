#pragma once

#include <functional>
#include <vector>

#include "head_loss.h"
#include "open_block.h"

namespace baseq {

/// Heads of the quantized and of the full-precision model, each in the basis of its stream.
struct Heads {
  Head student, teacher;
};

/// The decisions about a model so far.
struct ModelState {
  std::vector<BlockState> blocks;
  Tensor residual{};    ///< learned matrix of the residual stream, float64 [hidden_size, hidden_size]; undefined: none
  Tensor final_norm{};  ///< learned factor of the weight of the final norm, [hidden_size]; undefined: 1
};

/// The surroundings of a step over the whole model.
struct ModelTask {
  const ModelConfig& config;
  const Grids& grids;
  GptqOptions rounding{};     ///< of the recipe's round step
  const BlockInputs& inputs;  ///< the quantized stream before the first block, and what else a block is given
  Tensor target;              ///< the full-precision stream after the last block, in the basis of the checkpoint
  Tensor windows;             ///< token ids [num_samples, seq_len]
  std::function<Heads(at::ScalarType products)> heads;
  std::function<DecoderLayer(int64_t block)> read_original;  ///< in the basis of the residual stream
  /// With the gains of the norms in their readers, in the basis of the checkpoint.
  std::function<DecoderLayer(int64_t block)> read_fused{};
  /// The transform of the residual stream with such a matrix; undefined: the one that the stream has.
  std::function<Transform(const Tensor& matrix)> residual{};
  uint64_t seed = 0;
  ProgressFn report{};  ///< may be empty
};

/// Learns parameters of all blocks together by a loss at the head. The monitored windows are held out: no gradient is
/// of them, unless there is one window alone. Keeps the states where no epoch is better; a loss that is not finite ends
/// the step early.
void apply(const LearnStep& step, ModelState& state, const ModelTask& task);

}  // namespace baseq
