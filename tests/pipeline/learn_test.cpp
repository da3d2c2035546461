#include "baseq/pipeline/learn.h"

#include <cmath>

#include "learning_test.h"

namespace baseq {
namespace {

using test::TinyShape;

/// A 4-bit recipe with everything that stage 1 and stage 3 know.
Recipe learned_recipe(const TinyShape& shape) {
  Recipe recipe;
  recipe.weights = QuantSpec{.num_bits = 4};
  recipe.input_activations.emplace();
  recipe.input_activations->spec = {.symmetric = false, .strategy = Strategy::kToken, .dynamic = true};
  recipe.input_activations->clip = 0.9;
  recipe.input_activations->shift = recipe.input_activations->norm_shift = Recipe::Shift::kMean;
  recipe.kv_cache.emplace();
  recipe.kv_cache->spec = {
      .symmetric = false, .strategy = Strategy::kGroup, .group_size = shape.head_dim, .dynamic = true};
  recipe.kv_cache->shift = Recipe::Shift::kMean;
  recipe.transforms.value = recipe.transforms.query_key = recipe.transforms.down = true;
  recipe.learn_transforms.epochs = recipe.learn_activations.epochs = 1;
  recipe.products = at::kFloat;
  return recipe;
}

class Learn : public test::LearningTest {
 protected:
  Learn() { recipe = learned_recipe(shape); }
};

/// Every quant point on a fine grid, with corrections that are not at their start.
void correct_everywhere(DecoderLayer& layer, int64_t num_bits) {
  uint64_t seed = 300;
  for (const SiteInfo& info : sites()) {
    if (info.point.empty()) continue;
    const auto [groups, features] = layer.shape(info.site);
    QuantPoint& point = layer.point(info.site);
    point.enabled = true;
    point.spec = {.num_bits = num_bits,
                  .symmetric = false,
                  .strategy = info.cache ? Strategy::kGroup : Strategy::kToken,
                  .group_size = info.cache ? features / groups : 0,
                  .dynamic = true};
    point.clip = at::full({groups, 1}, 0.95, at::kDouble);
    point.shift = 0.5 * test::random_normal({features}, seed++);
    if (!info.cache) point.gain = 1 + 0.2 * test::random_normal({features}, seed++).tanh();
  }
}

TEST_P(Learn, MergedCorrectionsEqualExplicitOnes) {
  const RotaryEmbedding rope = test::tiny_rope(shape, kSeq);
  for (const bool online : {false, true}) {
    SCOPED_TRACE(online ? "online Hadamard" : "no online Hadamard");
    DecoderLayer explicit_one = test::tiny_layer(shape, 1);
    if (online) apply_hadamards(explicit_one, {.input = true, .query_key = true, .o = true, .down = true});
    correct_everywhere(explicit_one, 4);
    DecoderLayer merged = explicit_one;
    // K's shift is never added back: start_quant_points sets it so.
    merged.self_attn.k_cache.add_shift_back = false;
    merge_corrections(merged);
    const Tensor wide = x.to(at::kDouble);
    EXPECT_LT(test::relative_error(merged.forward(wide, rope), explicit_one.forward(wide, rope)), 1e-9);
    // What a reader of the checkpoint assumes.
    std::as_const(merged).for_each_quant_point(
        [&](const std::string& name, const QuantPoint& point) { EXPECT_FALSE(point.add_shift_back) << name; });
    EXPECT_EQ(merged.self_attn.input.gain.defined(), online);
    EXPECT_EQ(merged.mlp.input.gain.defined(), online);
    EXPECT_TRUE(merged.self_attn.o_input.gain.defined());
    EXPECT_TRUE(merged.self_attn.q_proj.bias.defined());
  }
}

TEST_P(Learn, ValueShiftsMergeIntoTheBiasOfO) {
  const RotaryEmbedding rope = test::tiny_rope(shape, kSeq);
  for (const bool online : {false, true}) {
    DecoderLayer explicit_one = test::tiny_layer(shape, 1);
    if (online) apply_hadamards(explicit_one, {.o = true});
    correct_everywhere(explicit_one, 4);
    // Only the cache is quantized; o keeps a gain.
    for (const Site site : {Site::kQkv, Site::kO, Site::kGateUp, Site::kDown}) {
      const Tensor gain = site == Site::kO ? explicit_one.self_attn.o_input.gain : Tensor{};
      explicit_one.point(site) = {.gain = gain};
    }
    DecoderLayer merged = explicit_one;
    merge_corrections(merged);
    EXPECT_FALSE(merged.self_attn.v_cache.add_shift_back);
    EXPECT_TRUE(merged.self_attn.o_proj.bias.defined());
    const Tensor wide = x.to(at::kDouble);
    EXPECT_LT(test::relative_error(merged.forward(wide, rope), explicit_one.forward(wide, rope)), 1e-9) << online;
  }
}

/// What a kernel computes: integer products, behind which the token's scale and zero point meet the weight's scales and
/// row sums.
TEST_P(Learn, IntegerEpilogueEqualsTheFakeQuantizedProduct) {
  DecoderLayer quantized = test::tiny_layer(shape, 1).to(at::kFloat);
  correct_everywhere(quantized, 4);
  quantized = quantized.to(at::kFloat);
  recipe.rounding = Recipe::Rounding::kNearest;
  round_layer(quantized, recipe, inputs, weights, 0, {});
  merge_corrections(quantized);
  const QuantPoint& point = quantized.mlp.down_input;
  const Linear& linear = quantized.mlp.down_proj;
  const Tensor input = test::random_normal({kSamples * kSeq, shape.intermediate_size}, 9, at::kFloat);

  const Tensor u = input * point.gain - point.shift;
  const QParams grid = compute_qparams(u, point.spec, point.clip);  // one scale and one zero point a token
  const Tensor codes = quantize(u, grid, point.spec).to(at::kLong);
  const QuantizedWeight& weight = *linear.quantized;
  const Tensor accumulated = at::matmul(codes, weight.codes.to(at::kLong).t());
  const Tensor row_sums = weight.codes.to(at::kLong).sum(1);
  const Tensor expected = grid.scale.to(at::kDouble) * (accumulated - grid.zero_point.to(at::kDouble) * row_sums) *
                              weight.qparams.scale.view({1, -1}).to(at::kDouble) +
                          linear.bias;
  EXPECT_LT(test::relative_error(linear.forward(point.forward(input)).to(at::kDouble), expected), 1e-5);
}

TEST_P(Learn, PointsStartAtTheMeansOfWhatTheySee) {
  DecoderLayer started = layer;
  apply_hadamards(started, recipe.transforms);
  const DecoderLayer probe = started;
  start_quant_points(started, recipe, inputs, weights);
  const Tensor qkv = probe.input_of(Site::kQkv, x, inputs.rope);
  EXPECT_LT(test::relative_error(started.self_attn.v_cache.shift, probe.self_attn.v_proj.forward(qkv).mean({0, 1})),
            1e-5);
  for (const SiteInfo& info : sites()) {
    if (info.point.empty()) continue;
    const QuantPoint& point = started.point(info.site);
    EXPECT_TRUE(point.enabled) << info.name;
    EXPECT_EQ(point.spec, info.cache ? recipe.kv_cache->spec : recipe.input_activations->spec) << info.name;
    const int64_t groups = info.cache ? shape.num_kv_heads : 1;
    EXPECT_TRUE(at::equal(point.clip, at::full({groups, 1}, info.cache ? 1.0 : 0.9))) << info.name;
    EXPECT_EQ(point.add_shift_back, info.site != Site::kQueryKey) << info.name;
    if (info.cache) continue;
    const Tensor mean = probe.input_of(info.site, x, inputs.rope).mean({0, 1});
    EXPECT_LT(test::relative_error(point.shift, mean), 1e-5) << info.name;
  }
}

TEST_P(Learn, MeanShiftsSeeThroughGains) {
  // A gain on o's input that o_proj divides out leaves every later mean where it was.
  DecoderLayer scaled = layer;
  const Tensor gain = (0.7 * test::random_normal({shape.num_heads * shape.head_dim}, 21, at::kFloat)).exp();
  scaled.self_attn.o_input.gain = gain;
  scaled.self_attn.o_proj.weight = scaled.self_attn.o_proj.weight / gain;
  DecoderLayer plain = layer;
  start_quant_points(plain, recipe, inputs, weights);
  start_quant_points(scaled, recipe, inputs, weights);
  EXPECT_LT(test::relative_error(scaled.mlp.input.shift, plain.mlp.input.shift), 1e-4);
  EXPECT_LT(test::relative_error(scaled.mlp.down_input.shift, plain.mlp.down_input.shift), 1e-4);
  EXPECT_LT(test::relative_error(scaled.self_attn.o_input.shift, gain * plain.self_attn.o_input.shift), 1e-4);
}

TEST_P(Learn, LearnedTransformsLeaveTheMeansBehindNorms) {
  recipe.learn_transforms.epochs = 3;
  recipe.learn_transforms.lr_scale = 0.1;
  const Tensor mean = layer.input_of(Site::kGateUp, x, inputs.rope).mean({0, 1});
  DecoderLayer learned = layer;
  learn_transforms(learned, task());
  EXPECT_LT(test::relative_error(learned.mlp.input.shift, mean), 1e-4);
}

TEST_P(Learn, ActivationsLowerTheLoss) {
  for (const at::ScalarType products : {at::kFloat, at::kBFloat16}) {
    recipe.products = products;
    recipe.learn_activations.epochs = 6;
    DecoderLayer learned = layer;
    apply_quarot(learned);
    round_layer(learned, recipe, inputs, weights, 0, {});
    const double before = loss_of(learned);
    learn_activations(learned, task());
    EXPECT_LT(loss_of(learned), before) << products;
    ASSERT_FALSE(stages.empty());
    EXPECT_LT(stages.back().loss_after, stages.back().loss_before);
    if (products == at::kFloat) {
      EXPECT_NEAR(stages.back().loss_after / loss_of(learned), 1.0, 1e-4);
    }
  }
}

TEST_P(Learn, ActivationsNeverEndAboveTheirStart) {
  recipe.learn_activations.lr_clip = recipe.learn_activations.lr_shift = recipe.learn_activations.lr_gain = 10.0;
  recipe.learn_activations.final_lr = 10.0;
  DecoderLayer learned = layer;
  apply_quarot(learned);
  round_layer(learned, recipe, inputs, weights, 0, {});
  const double before = loss_of(learned);
  learn_activations(learned, task());
  // A clip of exactly 1 starts at 0.999, so equality is up to that.
  EXPECT_LE(loss_of(learned), before * 1.01);
  EXPECT_LE(stages.back().loss_after, stages.back().loss_before);
}

TEST_P(Learn, WhereNoEpochIsBetterClipsAreWhatTheyWere) {
  recipe.input_activations->clip = recipe.kv_cache->clip = 1;
  // So far that nothing can be better.
  recipe.learn_activations.lr_clip = recipe.learn_activations.lr_shift = recipe.learn_activations.lr_gain = 10.0;
  recipe.learn_transforms.lr_rotation = recipe.learn_transforms.lr_scale = recipe.learn_transforms.lr_clip = 10.0;
  recipe.learn_activations.final_lr = recipe.learn_transforms.final_lr = 10.0;
  DecoderLayer learned = layer;
  const auto expect_full = [&] {
    ASSERT_EQ(stages.back().loss_after, stages.back().loss_before) << "an epoch was better";
    learned.for_each_quant_point([](const std::string& name, QuantPoint& point) {
      EXPECT_TRUE(at::equal(point.clip, at::ones_like(point.clip))) << name;
      EXPECT_FALSE(point.clip.requires_grad()) << name;
    });
  };
  learn_transforms(learned, task());
  expect_full();
  learn_activations(learned, task());
  expect_full();
}

TEST_P(Learn, ActivationsLeaveWeightsAlone) {
  DecoderLayer learned = layer;
  apply_quarot(learned);
  const DecoderLayer before = learned;
  learn_activations(learned, task());
  learned.for_each_linear([&](const std::string& name, Linear& linear) {
    EXPECT_TRUE(at::equal(linear.weight, before.linear(name).weight)) << name;
  });
  learned.for_each_quant_point([](const std::string& name, QuantPoint& point) {
    EXPECT_FALSE(point.clip.requires_grad() || point.shift.requires_grad()) << name;
  });
}

TEST_P(Learn, TransformsKeepShapesAndDoNotRaiseTheLoss) {
  for (const at::ScalarType products : {at::kFloat, at::kBFloat16}) {
    recipe.products = products;
    DecoderLayer learned = layer;
    learn_transforms(learned, task());
    ASSERT_FALSE(stages.empty());
    EXPECT_LE(stages.back().loss_after, stages.back().loss_before) << products;
    EXPECT_TRUE(std::isfinite(stages.back().loss_after));
    learned.for_each_linear([&](const std::string& name, Linear& linear) {
      EXPECT_EQ(linear.weight.sizes(), layer.linear(name).weight.sizes()) << name;
      EXPECT_EQ(linear.weight.scalar_type(), at::kFloat) << name;
      EXPECT_EQ(linear.bias.defined(), layer.linear(name).bias.defined()) << name;
      EXPECT_FALSE(linear.weight.requires_grad()) << name;
    });
    EXPECT_FALSE(learned.mlp.down_scale.defined());
    EXPECT_FALSE(learned.mlp.down_transform.empty() || learned.self_attn.query_key_transform.empty());
  }
}

TEST_P(Learn, LearnedTransformsKeepTheUnquantizedOutput) {
  recipe.learn_transforms.epochs = 12;
  DecoderLayer learned = layer;
  learn_transforms(learned, task());
  // Off, and without shifts: gains stay, for o_proj divides them out.
  learned.for_each_quant_point([](const std::string&, QuantPoint& point) {
    point.enabled = false;
    point.shift = Tensor{};
  });
  EXPECT_LT(test::relative_error(learned.forward(x, inputs.rope), target), 2e-5);
  EXPECT_FALSE(at::allclose(learned.self_attn.o_input.gain, at::ones({shape.num_heads * shape.head_dim})));
}

TEST_P(Learn, TransformsAtTheirStartAreTheFixedOnes) {
  auto& learning = recipe.learn_transforms;
  learning.lr_rotation = learning.lr_scale = learning.lr_clip = learning.lr_shift = learning.final_lr = 0;
  DecoderLayer learned = layer, fixed = layer;
  learn_transforms(learned, task());
  apply_quarot(fixed);
  // The identity by Cayley, exp(0) and the Hadamard of the same dtype: bit for bit the same weights ...
  learned.for_each_linear([&](const std::string& name, Linear& linear) {
    EXPECT_TRUE(at::equal(linear.weight, fixed.linear(name).weight)) << name;
  });
  // ... while clips went through a logit and back.
  for (const SiteInfo& info : sites()) {
    if (info.point.empty()) continue;
    EXPECT_LT(test::relative_error(learned.point(info.site).clip, fixed.point(info.site).clip), 1e-6) << info.name;
    EXPECT_TRUE(at::allclose(learned.point(info.site).shift, fixed.point(info.site).shift, 1e-5, 1e-6)) << info.name;
  }
  recipe.rounding = Recipe::Rounding::kGptq;
  round_layer(learned, recipe, inputs, weights, 0, {});
  round_layer(fixed, recipe, inputs, weights, 0, {});
  learned.for_each_linear([&](const std::string& name, Linear& linear) {
    EXPECT_TRUE(at::equal(linear.quantized->codes, fixed.linear(name).quantized->codes)) << name;
  });
}

TEST_P(Learn, SameSeedSameBytes) {
  const auto run = [&] {
    DecoderLayer learned = layer;
    learn_transforms(learned, task());
    learn_activations(learned, task());
    return layer_tensors(learned, "", at::kFloat);
  };
  const auto once = run(), again = run();
  ASSERT_EQ(once.size(), again.size());
  for (const auto& [name, tensor] : once) EXPECT_TRUE(at::equal(tensor, again.at(name))) << name;
}

INSTANTIATE_TEST_SUITE_P(Shapes, Learn, testing::ValuesIn(test::tiny_shapes()),
                         [](const auto& shape) { return shape.param.name; });

/// Gaussian tokens with channel means m: subtracting m takes the share rho / (1 + rho) out of the energy of a token,
/// rho = mean(m^2) / sigma^2, and the squared step of a grid with one scale a token falls with it.
TEST(MeanShift, LowersTheRoundingErrorByItsShareOfTheEnergy) {
  constexpr int64_t kTokens = 400, kFeatures = 1024;
  const QuantSpec spec{.num_bits = 4, .symmetric = false, .strategy = Strategy::kToken, .dynamic = true};
  const Tensor noise = test::random_normal({kTokens, kFeatures}, 1, at::kFloat);
  for (const double rho : {0.25, 1.0, 3.0}) {
    // Means as a Hadamard transform leaves them: Gaussian over the channels.
    const Tensor direction = test::random_normal({kFeatures}, 2, at::kFloat);
    const Tensor mean = direction * std::sqrt(rho / direction.square().mean().item<double>());
    const Tensor x = noise + mean;
    const auto error = [&](const Tensor& shift) {
      return (fake_quantize_dynamic(x, spec, {}, {}, shift, /*add_shift_back=*/true) - x).square().mean();
    };
    const double ratio = (error(x.mean(0)) / error({})).item<double>();
    EXPECT_NEAR(ratio * (1 + rho), 1.0, 0.1) << "rho " << rho;
  }
}

}  // namespace
}  // namespace baseq
