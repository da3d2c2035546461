#include "baseq/pipeline/merge.h"

#include <gtest/gtest.h>

#include <functional>

#include "../tiny_model.h"
#include "baseq/io/checkpoint.h"
#include "baseq/pipeline/quantize_checkpoint.h"
#include "baseq/transform/hadamard.h"

namespace baseq {
namespace {

using test::TempDirectory;
using test::TinyShape;

constexpr double kTolerance = 1e-10;

/// T and T^-T, well conditioned and different for every head.
std::pair<Tensor, Tensor> random_matrices(const TinyShape& shape, uint64_t seed) {
  const int64_t dim = shape.head_dim;
  const Tensor noise = test::random_normal({shape.num_kv_heads, dim, dim}, seed);
  const Tensor matrices = at::eye(dim, at::kDouble) + noise * (0.3 / std::sqrt(double(dim)));
  return {matrices, at::linalg_inv(matrices).transpose(1, 2)};
}

class Merge : public testing::TestWithParam<TinyShape> {
 protected:
  TinyShape shape = GetParam();
  DecoderLayer layer = test::tiny_layer(shape, 1);
  Tensor x = test::random_normal({2, 11, shape.hidden_size}, 7);
  RotaryEmbedding rope = test::tiny_rope(shape, 11);

  /// The merge changes weights and leaves the output.
  void expect_kept(const std::function<void(DecoderLayer&)>& merge) {
    DecoderLayer merged = layer;
    merge(merged);
    EXPECT_LT(test::relative_error(merged.forward(x, rope), layer.forward(x, rope)), kTolerance);
  }
};

TEST_P(Merge, FusedNormGainsKeepTheOutput) {
  expect_kept(fuse_norm_gains);
  fuse_norm_gains(layer);
  EXPECT_TRUE(at::equal(layer.input_layernorm.weight, at::ones({shape.hidden_size}, at::kDouble)));
  EXPECT_TRUE(at::equal(layer.post_attention_layernorm.weight, at::ones({shape.hidden_size}, at::kDouble)));
}

TEST_P(Merge, RotatedResidualRotatesTheOutput) {
  DecoderLayer rotated = layer;
  fuse_norm_gains(rotated);
  rotate_residual(rotated);
  const Tensor expected = hadamard_transform(layer.forward(x, rope));
  EXPECT_LT(test::relative_error(rotated.forward(hadamard_transform(x), rope), expected), kTolerance);
}

TEST_P(Merge, AnyInvertibleValueTransformKeepsTheOutput) {
  const auto [matrices, inverse_transposes] = random_matrices(shape, 3);
  expect_kept([&](DecoderLayer& merged) { transform_values(merged, matrices, inverse_transposes); });
}

TEST_P(Merge, ValueTransformChangesWhatTheCacheHolds) {
  const auto [matrices, inverse_transposes] = random_matrices(shape, 3);
  const auto values = [&](DecoderLayer& of) {
    return of.self_attn.v_proj.forward(x).view({2, 11, shape.num_kv_heads, shape.head_dim});
  };
  const Tensor before = values(layer);
  transform_values(layer, matrices, inverse_transposes);
  const Tensor expected = at::einsum("bskd,kde->bske", {before, matrices});
  EXPECT_LT(test::relative_error(values(layer), expected), kTolerance);
}

TEST_P(Merge, RotatedValuesKeepTheOutput) { expect_kept(rotate_values); }

TEST_P(Merge, OnlineChainsOfEveryKindKeepTheOutput) {
  for (const SiteInfo& info : sites()) {
    if (!info.online) continue;
    SCOPED_TRACE(info.name);
    const int64_t n = info.site == Site::kQueryKey ? shape.head_dim : layer.shape(info.site).features;
    const auto invertible = [&](int64_t size, uint64_t seed) {
      return at::eye(size, at::kDouble) + test::random_normal({size, size}, seed) * (0.3 / std::sqrt(size));
    };
    const Transform chain = {scale_factor(test::random_normal({n}, 1).exp()), hadamard_factor(n),
                             matrix_factor(invertible(n, 2)), kronecker_factor(invertible(2, 3), invertible(n / 2, 4)),
                             permutation_factor(at::randperm(n, at::kLong))};
    for (const Factor& factor : chain) {
      expect_kept([&](DecoderLayer& merged) { transform_online(merged, info.site, factor); });
    }
    expect_kept([&](DecoderLayer& merged) {
      for (const Factor& factor : chain) transform_online(merged, info.site, factor);
    });
  }
}

TEST_P(Merge, MergedDownScaleKeepsTheOutput) {
  layer.mlp.down_scale = 1 + 0.5 * test::random_normal({shape.intermediate_size}, 4).tanh();
  expect_kept(merge_down_scale);
  merge_down_scale(layer);
  EXPECT_FALSE(layer.mlp.down_scale.defined());
}

TEST_P(Merge, AllTogetherKeepTheOutput) {
  const auto [matrices, inverse_transposes] = random_matrices(shape, 5);
  const Tensor expected = hadamard_transform(layer.forward(x, rope));
  fuse_norm_gains(layer);
  rotate_residual(layer);
  transform_values(layer, matrices, inverse_transposes);
  const Tensor scale = 1 + 0.5 * test::random_normal({shape.intermediate_size}, 4).tanh();
  layer.mlp.down_scale = scale;
  layer.mlp.down_proj.weight = layer.mlp.down_proj.weight / scale;
  merge_down_scale(layer);
  apply_hadamards(layer, {.input = true, .value = true, .query_key = true, .o = true, .down = true});
  EXPECT_LT(test::relative_error(layer.forward(hadamard_transform(x), rope), expected), kTolerance);
}

INSTANTIATE_TEST_SUITE_P(Shapes, Merge, testing::ValuesIn(test::tiny_shapes()),
                         [](const auto& shape) { return shape.param.name; });

TEST(TransformValues, RefusesMatricesOfAnotherShape) {
  DecoderLayer layer = test::tiny_layer({}, 1);
  const Tensor wrong = at::eye(8, at::kDouble).expand({4, 8, 8});
  test::expect_error([&] { transform_values(layer, wrong, wrong); }, {"[2, 8, 8]", "[4, 8, 8]"});
}

TEST(RotatedCheckpoint, HasTheLogitsOfTheOriginal) {
  for (const TinyShape& shape : test::tiny_shapes()) {
    for (const bool online_everywhere : {false, true}) {
      SCOPED_TRACE(shape.name + (online_everywhere ? ", online" : ", merged residual"));
      Recipe recipe;
      recipe.dtype = at::kFloat;
      recipe.transforms.residual = !online_everywhere;
      recipe.transforms.input = recipe.transforms.o = online_everywhere;
      recipe.transforms.value = recipe.transforms.query_key = recipe.transforms.down = true;
      const TempDirectory directory;
      test::write_checkpoint(directory / "in", shape);
      const Checkpoint original(directory / "in");
      quantize_checkpoint(original, recipe, {}, directory / "out");
      const Checkpoint rotated(directory / "out");
      EXPECT_EQ(rotated.contains("lm_head.weight"), recipe.transforms.residual || !shape.tied);
      EXPECT_EQ(rotated.config().at("tie_word_embeddings").get<bool>(), !recipe.transforms.residual && shape.tied);
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
