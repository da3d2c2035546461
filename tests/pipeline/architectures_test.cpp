#include <gtest/gtest.h>

#include "baseq/eval/evaluate.h"
#include "baseq/io/checkpoint.h"
#include "baseq/pipeline/job.h"
#include "baseq/transform/hadamard.h"
#include "block_test.h"
#include "pipeline/merge.h"
#include "tiny_run.h"

/// Every architecture and option of tests/data, whose logits tests/model compares with transformers, through the merges
/// and the whole pipeline.
namespace baseq {
namespace {

using test::TempDirectory;

class Architecture : public testing::TestWithParam<std::string> {
 protected:
  Tensor logits(const char* name) const { return Model(Checkpoint(directory / name)).logits(ids); }

  const TempDirectory directory;
  const Checkpoint original{test::golden_directory(GetParam())};
  const SafetensorsFile golden{test::golden_directory(GetParam()) / "golden.safetensors"};
  const Tensor ids = golden.tensor("input_ids");
};

TEST_P(Architecture, RotatedModelIsTheOriginalInFloat64) {
  const Model model(original, {.dtype = at::kDouble});
  const BlockState state = test::with_hadamards(
      model.config(), {Site::kQkv, Site::kQueryKey, Site::kValue, Site::kO, Site::kGateUp, Site::kDown});
  Tensor hidden = hadamard_transform(model.embed(ids));
  const RotaryEmbedding rope = model.rotary(ids.size(1));
  for (int64_t i = 0; i < model.config().num_hidden_layers; ++i) {
    DecoderLayer layer = model.layer(i);
    fuse_norm_gains(layer);
    transform_residual(layer, {hadamard_factor(model.config().hidden_size)});
    hidden = realize(layer, state, {model.config(), i, at::kDouble}).forward(hidden, rope);
  }
  RmsNorm norm = model.final_norm();
  Linear head = model.lm_head();
  head.weight = hadamard_transform(head.weight * norm.weight);
  norm.weight = at::ones_like(norm.weight);
  EXPECT_LT(test::relative_error(head.forward(norm.forward(hidden)), model.logits(ids)), 1e-10);
}

TEST_P(Architecture, RotatedCheckpointHasTheLogitsOfTheOriginal) {
  Recipe recipe;
  recipe.dtype = at::kFloat;
  recipe.passes[0].steps = {
      TransformStep{.at = {Site::kResidual, Site::kValue, Site::kQueryKey, Site::kO, Site::kDown}}};
  quantize(test::job_of(original, recipe, {}, directory / "out"));
  EXPECT_LT(test::relative_error(logits("out"), Model(original, {.dtype = at::kDouble}).logits(ids)), 1e-5);
}

TEST_P(Architecture, EmptyRecipeKeepsEveryLogit) {
  quantize(test::job_of(original, Recipe{}, {}, directory / "out"));
  EXPECT_TRUE(at::equal(logits("out"), Model(original).logits(ids)));
}

TEST_P(Architecture, QuantizedAtEightBitsReloadsAndEvaluates) {
  const Tensor windows = test::random_ids({2, 24}, Model(original).config().vocab_size, 3);
  double last_error = 0;
  const ProgressFn progress = [&](const ProgressEvent& event) {
    if (const auto* block = std::get_if<BlockFinished>(&event)) last_error = block->relative_error;
  };
  quantize(test::job_of(original, test::at_eight_bits(test::kEverything), windows, directory / "out", {}, progress));
  // What separates the two streams is the grid alone: a multiplier or a norm forgotten in one of them would be seen.
  EXPECT_LT(last_error, 0.01);
  EXPECT_LT(test::relative_error(logits("out"), Model(original).logits(ids)), 0.06);
  const Checkpoint out(directory / "out");
  const Model quantized(out), full_precision(original);
  Reference reference{full_precision};
  const Evaluation evaluation = evaluate(quantized, ids, &reference);
  EXPECT_LT(evaluation.mean_kl, 0.01);
  EXPECT_GT(evaluation.top1_agreement, 0.8);
  EXPECT_TRUE(std::isfinite(evaluation.perplexity));
}

INSTANTIATE_TEST_SUITE_P(Variants, Architecture, testing::ValuesIn(test::golden_variants()),
                         [](const auto& variant) { return variant.param; });

}  // namespace
}  // namespace baseq
