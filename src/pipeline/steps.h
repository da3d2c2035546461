#pragma once

#include <vector>

#include "open_block.h"

namespace baseq {

// One function per kind of step. Each changes the state of `block` and nothing else.

/// The factor at kResidual is not the business of one block: see residual_transform().
void apply(const TransformStep& step, OpenBlock& block, const BlockTask& task);
void apply(const PointsStep& step, OpenBlock& block, const BlockTask& task);
/// Tells each choice as a TransformChosen.
void apply(const ChooseStep& step, OpenBlock& block, const BlockTask& task);
/// Keeps the state where no epoch is better than the start. A loss that is not finite ends the step early.
void apply(const LearnStep& step, OpenBlock& block, const BlockTask& task);
/// A block of a window, open.
struct WindowBlock {
  OpenBlock& block;
  const BlockTask& task;  ///< the inputs of the first block, and target and weights after the last one
};
/// The same for consecutive blocks together: the first is given the stream, and the loss is at the output of the last.
/// One graph holds all of them.
void learn_together(const LearnStep& step, const std::vector<WindowBlock>& window);
/// Linears are rounded in the order in which data passes them (q, k, v; o; gate, up; down): each sees inputs that the
/// already rounded ones produced.
void apply(const RoundStep& step, OpenBlock& block, const BlockTask& task);
/// Whether GPTQ is given so many tokens themselves: what else there is to compute from the inputs takes their moments.
bool takes_tokens(const RoundStep& step, int64_t num_tokens, int64_t features);
/// The one for the kind that `step` is.
inline void apply_any(const Step& step, OpenBlock& block, const BlockTask& task) {
  std::visit([&](const auto& typed) { apply(typed, block, task); }, step);
}

/// The transform of the residual stream, which all blocks share; orthogonal.
/// @param matrix what was learned in place of the identity of a "matrix", float64 [n, n]; may be undefined
Transform residual_transform(const Recipe& recipe, const ModelConfig& config, at::Device device,
                             const Tensor& matrix = {});

}  // namespace baseq
