#include "pipeline/merge.h"

#include <gtest/gtest.h>

#include <utility>

#include "../job_of.h"
#include "baseq/io/checkpoint.h"
#include "baseq/pipeline/job.h"
#include "baseq/transform/hadamard.h"
#include "block_test.h"
#include "random_factors.h"

namespace baseq {
namespace {

using Kind = Factor::Kind;
using test::TempDirectory;
using test::TinyShape;

constexpr double kTolerance = 1e-10;

class Merge : public test::BlockTest {
 protected:
  Merge() : BlockTest(at::kDouble) {}

  DecoderLayer with_corrections(const std::vector<Site>& hadamards) const {
    DecoderLayer result = realize(layer, test::with_hadamards(config, hadamards), place);
    for (const auto& [site, point] : test::corrected_points(config, 4)) result.point(site) = point;
    return result;
  }
  void expect_same_output(const DecoderLayer& got, const DecoderLayer& expected) const {
    EXPECT_LT(test::relative_error(got.forward(x, inputs.rope), expected.forward(x, inputs.rope)), 1e-9);
  }
};

TEST_P(Merge, FusedNormGainsKeepTheOutput) {
  fuse_norm_gains(layer);
  EXPECT_LT(test::relative_error(layer.forward(x, inputs.rope), target), kTolerance);
  EXPECT_TRUE(at::equal(layer.input_layernorm.weight, at::ones({shape.hidden_size}, at::kDouble)));
  EXPECT_TRUE(at::equal(layer.post_attention_layernorm.weight, at::ones({shape.hidden_size}, at::kDouble)));
}

TEST_P(Merge, ATransformedResidualTransformsTheOutput) {
  fuse_norm_gains(layer);
  const int64_t hidden = shape.hidden_size;
  const Factor hadamard = hadamard_factor(hidden);
  const Factor rotation = rotation_factor(cayley(test::random_normal({hidden, hidden}, 5)));
  const Factor permutation = test::random_factor(Kind::kPermutation, Site::kQkv, config, 6);
  for (const Transform& transform :
       {Transform{hadamard}, Transform{rotation}, Transform{permutation, hadamard, rotation}}) {
    DecoderLayer transformed = layer;
    transform_residual(transformed, transform);
    EXPECT_LT(test::relative_error(transformed.forward(apply_transform(transform, x), inputs.rope),
                                   apply_transform(transform, target)),
              kTolerance);
  }
}

TEST_P(Merge, AllTransformsTogetherKeepTheOutput) {
  fuse_norm_gains(layer);
  transform_residual(layer, {hadamard_factor(shape.hidden_size)});
  BlockState state =
      test::with_hadamards(config, {Site::kQkv, Site::kQueryKey, Site::kValue, Site::kO, Site::kGateUp, Site::kDown});
  const auto put_first = [&](Site site, Kind kind) {
    Transform& transform = state.transforms.at(site);
    transform.insert(transform.begin(), test::random_factor(kind, site, config, 5));
  };
  put_first(Site::kValue, Kind::kMatrix);
  put_first(Site::kDown, Kind::kScale);
  put_first(Site::kQkv, Kind::kScale);  // the norms have gain 1 now and take it
  const DecoderLayer merged = realize(layer, state, place);
  EXPECT_LT(test::relative_error(merged.forward(hadamard_transform(x), inputs.rope), hadamard_transform(target)),
            kTolerance);
}

TEST_P(Merge, MergedCorrectionsEqualExplicitOnes) {
  for (const bool online : {false, true}) {
    SCOPED_TRACE(online ? "online Hadamard" : "no online Hadamard");
    const std::vector<Site> hadamards = {Site::kQkv, Site::kQueryKey, Site::kO, Site::kGateUp, Site::kDown};
    const DecoderLayer explicit_one = with_corrections(online ? hadamards : std::vector<Site>{});
    DecoderLayer merged = explicit_one;
    // K's shift is never added back: a points step sets it so.
    merged.self_attn.k_cache.add_shift_back = false;
    merge_corrections(merged);
    expect_same_output(merged, explicit_one);
    // A reader of the checkpoint assumes this.
    std::as_const(merged).for_each_quant_point(
        [&](const std::string& name, const QuantPoint& point) { EXPECT_FALSE(point.add_shift_back) << name; });
    EXPECT_EQ(merged.self_attn.input.gain.defined(), online);
    EXPECT_EQ(merged.mlp.input.gain.defined(), online);
    EXPECT_TRUE(merged.self_attn.o_input.gain.defined());
    EXPECT_TRUE(merged.self_attn.q_proj.bias.defined());
  }
}

TEST_P(Merge, ValueShiftsMergeIntoTheBiasOfO) {
  for (const bool online : {false, true}) {
    SCOPED_TRACE(online);
    DecoderLayer explicit_one = with_corrections(online ? std::vector<Site>{Site::kO} : std::vector<Site>{});
    // Only the cache is quantized; o keeps a gain.
    for (const Site site : test::kInputSites) {
      const Tensor gain = site == Site::kO ? explicit_one.self_attn.o_input.gain : Tensor{};
      explicit_one.point(site) = {.gain = gain};
    }
    DecoderLayer merged = explicit_one;
    merge_corrections(merged);
    EXPECT_FALSE(merged.self_attn.v_cache.add_shift_back);
    EXPECT_TRUE(merged.self_attn.o_proj.bias.defined());
    expect_same_output(merged, explicit_one);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, Merge, testing::ValuesIn(test::tiny_shapes()), test::shape_name);

TEST(RotatedCheckpoint, HasTheLogitsOfTheOriginal) {
  for (const TinyShape& shape : test::tiny_shapes()) {
    for (const bool online_everywhere : {false, true}) {
      SCOPED_TRACE(shape.name + (online_everywhere ? ", online" : ", merged residual"));
      Recipe recipe;
      recipe.dtype = at::kFloat;
      std::vector<Site> at = {Site::kValue, Site::kQueryKey, Site::kDown};
      if (online_everywhere) {
        at.insert(at.end(), {Site::kQkv, Site::kO, Site::kGateUp});
      } else {
        at.push_back(Site::kResidual);
      }
      recipe.passes[0].steps = {TransformStep{.at = at}};
      const TempDirectory directory;
      test::write_checkpoint(directory / "in", shape);
      const Checkpoint original(directory / "in");
      quantize(test::job_of(original, recipe, {}, directory / "out"));
      const Checkpoint rotated(directory / "out");
      EXPECT_EQ(rotated.contains("lm_head.weight"), !online_everywhere || !shape.tied);
      EXPECT_EQ(rotated.config().at("tie_word_embeddings").get<bool>(), online_everywhere && shape.tied);
      const Tensor ids = test::random_ids({2, 13}, shape.vocab_size, 2);
      EXPECT_LT(test::relative_error(Model(rotated).logits(ids), Model(original, {.dtype = at::kDouble}).logits(ids)),
                1e-5);
      EXPECT_FALSE(at::equal(rotated.tensor("model.layers.0.mlp.down_proj.weight"),
                             original.tensor("model.layers.0.mlp.down_proj.weight")));
    }
  }
}

}  // namespace
}  // namespace baseq
