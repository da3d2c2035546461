#pragma once

#include <gtest/gtest.h>

#include <vector>

#include "../tiny_model.h"
#include "baseq/pipeline/learn.h"
#include "baseq/pipeline/merge.h"
#include "baseq/pipeline/start_points.h"
#include "baseq/pipeline/statistics.h"

namespace baseq::test {

/// A block of a tiny model, four windows of inputs, and its output on them as the target.
class LearningTest : public testing::TestWithParam<TinyShape> {
 protected:
  static constexpr int64_t kSeq = 16, kSamples = 4;

  TinyShape shape = GetParam();
  Recipe recipe;
  DecoderLayer layer = tiny_layer(shape, 1, at::kFloat);
  Tensor x = random_normal({kSamples, kSeq, shape.hidden_size}, 7, at::kFloat) +
             random_normal({shape.hidden_size}, 8, at::kFloat);
  BlockInputs inputs{.full_precision = x, .quantized = x, .rope = tiny_rope(shape, kSeq, at::kFloat)};
  Tensor target = layer.forward(x, inputs.rope);
  Tensor weights = token_weights(target, Recipe::Loss::kMse, at::kFloat);
  std::vector<StageLearned> stages;
  ProgressFn progress = [this](const ProgressEvent& event) {
    if (const auto* stage = std::get_if<StageLearned>(&event)) stages.push_back(*stage);
  };

  LearningTask task() const {
    return {.recipe = recipe,
            .inputs = inputs,
            .target = target,
            .token_weights = weights,
            .seed = 3,
            .progress = progress};
  }
  /// Mean squared error over all windows, which is what the monitor sees here (kSamples = num_monitored).
  double loss_of(const DecoderLayer& of) const {
    return (of.forward(x, inputs.rope) - target).square().mean().item<double>();
  }
  void apply_quarot(DecoderLayer& to) const {
    apply_hadamards(to, recipe.transforms);
    start_quant_points(to, recipe, inputs, weights);
  }
};

}  // namespace baseq::test
