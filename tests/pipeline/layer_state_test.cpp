#include "baseq/pipeline/layer_state.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "baseq/pipeline/merge.h"
#include "baseq/pipeline/round_layer.h"
#include "baseq/pipeline/start_points.h"
#include "tiny_run.h"

namespace baseq {
namespace {

class LayerState : public test::TinyRun, public testing::WithParamInterface<test::TinyShape> {
 protected:
  LayerState() : TinyRun(GetParam()) {}
};

INSTANTIATE_TEST_SUITE_P(Shapes, LayerState, testing::ValuesIn(test::tiny_shapes()),
                         [](const auto& shape) { return shape.param.name; });

TEST_P(LayerState, GivesTheSameBlockBack) {
  Recipe recipe = test::recipe_of(test::kOnline);
  const Model model(*original, {.dtype = at::kFloat});
  recipe.kv_cache->spec.group_size = model.config().head_dim;
  const Tensor x = at::randn({3, 12, shape.hidden_size});
  const BlockInputs inputs{.full_precision = x,
                           .quantized = x + 0.01 * at::randn(x.sizes()),
                           .rope = RotaryEmbedding::create(model.config(), 12, at::kFloat)};
  const Tensor weights = at::ones({3, 12});
  DecoderLayer layer = model.layer(0);
  const auto check = [&](const char* when) {
    SCOPED_TRACE(when);
    const auto state = layer_state(layer);
    const DecoderLayer again = restore_layer(DecoderLayer::create(model.config(), 0), state, recipe, at::kFloat);
    EXPECT_TRUE(at::equal(again.forward(x, inputs.rope), layer.forward(x, inputs.rope)));
    const auto written = layer_tensors(layer, "", at::kFloat), rewritten = layer_tensors(again, "", at::kFloat);
    ASSERT_EQ(written.size(), rewritten.size());
    for (const auto& [name, tensor] : written) EXPECT_TRUE(at::equal(tensor, rewritten.at(name))) << name;
    const auto restored = layer_state(again);
    ASSERT_EQ(restored.size(), state.size());
    for (const auto& [name, tensor] : state) EXPECT_TRUE(at::equal(tensor, restored.at(name))) << name;
  };
  check("as the checkpoint has it");
  apply_hadamards(layer, recipe.transforms);
  transform_online(layer, Site::kO, scale_factor(at::rand({layer.shape(Site::kO).features}) + 0.5));
  transform_online(layer, Site::kDown, permutation_factor(at::randperm(shape.intermediate_size, at::kLong)));
  transform_online(layer, Site::kQueryKey, matrix_factor(at::eye(shape.head_dim) + 0.1));
  layer = layer.to(at::kFloat);
  start_quant_points(layer, recipe, inputs, weights);
  layer.mlp.down_input.gain = at::rand({shape.intermediate_size}) + 0.5;
  check("with quant points");
  round_layer(layer, recipe, inputs, weights, 0, {});
  check("rounded");
  recipe.low_rank = Recipe::LowRank{.method = Recipe::LowRank::Method::kSvd, .rank = 3, .dtype = at::kChar};
  round_layer(layer, recipe, inputs, weights, 0, {});
  check("with corrections of 8 bits");
}

TEST_P(LayerState, WhatIsMissingIsNamed) {
  const Model model(*original, {.dtype = at::kFloat});
  auto state = layer_state(model.layer(0));
  const auto restore = [&] { restore_layer(DecoderLayer::create(model.config(), 0), state, {}, at::kFloat); };
  restore();
  state.erase("mlp.up_proj.weight");
  test::expect_error(restore, {"mlp.up_proj.weight", "missing"});
}

}  // namespace
}  // namespace baseq
