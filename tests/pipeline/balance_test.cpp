#include "pipeline/balance.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "block_test.h"

namespace baseq {
namespace {

using test::TinyShape;

Tensor random_definite(int64_t count, int64_t n, uint64_t seed) {
  const Tensor factor = test::random_normal({count, n, n}, seed);
  return at::matmul(factor, factor.transpose(1, 2)) / double(n) + 0.1 * at::eye(n, at::kDouble);
}

const std::vector<Site> kNorms = {Site::kQkv, Site::kGateUp};
const std::vector<Site> kAll = {Site::kQkv, Site::kQueryKey, Site::kValue, Site::kGateUp, Site::kDown};

class Balance : public test::BlockTest {
 protected:
  Balance() : BlockTest(at::kDouble) {
    // Channels of very different size, as real residual streams have.
    x = x * (1.5 * test::random_normal({shape.hidden_size}, 8)).exp();
    inputs.full_precision = inputs.quantized = x;
    target = layer.forward(x, inputs.rope);
  }

  /// The block that `of` is with these factors.
  DecoderLayer realized(const DecoderLayer& of, const std::map<Site, Factor>& factors) const {
    BlockState state;
    for (const auto& [site, factor] : factors) state.transforms[site] = {factor};
    return realize(of, state, {config, 0, weights.options()});
  }
  DecoderLayer balanced(const std::vector<Site>& at) const {
    const Balanced found = balance(layer, at, inputs, weights);
    EXPECT_TRUE(found.left_out.empty());
    return realized(layer, found.factors);
  }
  void expect_kept(const DecoderLayer& changed) const {
    EXPECT_LT(test::relative_error(changed.forward(x, inputs.rope), layer.forward(x, inputs.rope)), 1e-10);
  }
  /// (sum_j a_j^2) (sum_j w_j^2): what the error of a one-scale grid behind a Hadamard transform is proportional to.
  double error_bound(const DecoderLayer& of, Site point, const std::vector<const Linear*>& readers) const {
    const Tensor activations = of.input_of(point, x, inputs.rope).flatten(0, 1).var(0, /*unbiased=*/false).sum();
    double energy = 0;
    for (const Linear* reader : readers) energy += reader->weight.square().sum().item<double>();
    return activations.item<double>() * energy;
  }
};

TEST_P(Balance, EveryScaleKeepsTheOutput) {
  const DecoderLayer norm = balanced(kNorms);
  const DecoderLayer value = balanced({Site::kValue});
  const DecoderLayer query_key = balanced({Site::kQueryKey});
  const DecoderLayer down = balanced({Site::kDown});
  for (const DecoderLayer* changed : {&norm, &value, &query_key, &down}) expect_kept(*changed);
  expect_kept(balanced(kAll));
  // Each touched what it should.
  EXPECT_FALSE(at::equal(norm.input_layernorm.weight, layer.input_layernorm.weight));
  EXPECT_FALSE(at::equal(norm.post_attention_layernorm.weight, layer.post_attention_layernorm.weight));
  EXPECT_FALSE(at::equal(value.self_attn.v_proj.weight, layer.self_attn.v_proj.weight));
  // Behind a norm of the keys a scale of their rows would be lost.
  const bool normed = layer.self_attn.k_norm.weight.defined();
  EXPECT_EQ(at::equal(query_key.self_attn.k_proj.weight, layer.self_attn.k_proj.weight), normed);
  EXPECT_TRUE(!normed || !at::equal(query_key.self_attn.k_norm.weight, layer.self_attn.k_norm.weight));
  EXPECT_FALSE(at::equal(down.mlp.up_proj.weight, layer.mlp.up_proj.weight));
}

TEST_P(Balance, NothingChosenChangesNothing) {
  const DecoderLayer same = balanced({});
  EXPECT_TRUE(at::equal(same.forward(x, inputs.rope), layer.forward(x, inputs.rope)));
}

TEST_P(Balance, ScalesLowerTheErrorBound) {
  const auto qkv = [](const DecoderLayer& of) {
    return std::vector<const Linear*>{&of.self_attn.q_proj, &of.self_attn.k_proj, &of.self_attn.v_proj};
  };
  const auto gate_up = [](const DecoderLayer& of) {
    return std::vector<const Linear*>{&of.mlp.gate_proj, &of.mlp.up_proj};
  };
  const DecoderLayer norm = balanced(kNorms);
  EXPECT_LT(error_bound(norm, Site::kQkv, qkv(norm)), 0.95 * error_bound(layer, Site::kQkv, qkv(layer)));
  EXPECT_LT(error_bound(norm, Site::kGateUp, gate_up(norm)), 0.95 * error_bound(layer, Site::kGateUp, gate_up(layer)));
  const DecoderLayer down = balanced({Site::kDown});
  EXPECT_LT(error_bound(down, Site::kDown, {&down.mlp.down_proj}),
            0.95 * error_bound(layer, Site::kDown, {&layer.mlp.down_proj}));
}

TEST_P(Balance, DownScaleReachesTheCauchySchwarzBound) {
  // (sum_j a_j |w_j|)^2 is the least value of the product; measured on the balanced layer both factors are known.
  const Tensor a = layer.input_of(Site::kDown, x, inputs.rope).flatten(0, 1).var(0, /*unbiased=*/false).sqrt();
  const Tensor w = layer.mlp.down_proj.weight.square().sum(0).sqrt();
  const double least = (a * w).sum().square().item<double>();
  const DecoderLayer down = balanced({Site::kDown});
  EXPECT_NEAR(error_bound(down, Site::kDown, {&down.mlp.down_proj}) / least, 1.0, 1e-3);
}

TEST_P(Balance, ValueMatricesLowerTheirTraceProduct) {
  const auto product = [&](const DecoderLayer& of) {
    // One key/value head at a time; T mixes the channels of a head only.
    const Moments moments = measure_block(of, x, inputs.rope, weights, {.with_o_covariance = true}).at(Site::kO);
    const int64_t width = shape.num_heads / shape.num_kv_heads * shape.head_dim;
    const Tensor energy = of.self_attn.o_proj.weight.square().sum(0);
    double sum = 0;
    for (int64_t head = 0; head < shape.num_kv_heads; ++head) {
      sum += (moments.variance.narrow(0, head * width, width).sum() * energy.narrow(0, head * width, width).sum())
                 .item<double>();
    }
    return sum;
  };
  EXPECT_LT(product(balanced({Site::kValue})), product(layer));
}

void expect_finite(const DecoderLayer& layer) {
  for (const auto& [name, tensor] : layer_tensors(layer, "", at::kDouble)) {
    EXPECT_TRUE(tensor.isfinite().all().item<bool>()) << name;
  }
}

TEST_P(Balance, ProjectionsOfZerosAreLeftWhole) {
  const DecoderLayer whole = layer;
  for (const std::vector<std::string>& zeros :
       std::vector<std::vector<std::string>>{{"self_attn.o_proj"},
                                             {"self_attn.v_proj"},
                                             {"self_attn.v_proj", "self_attn.o_proj"},
                                             {"self_attn.q_proj"},
                                             {"self_attn.q_proj", "self_attn.k_proj"},
                                             {"mlp.down_proj"},
                                             {"mlp.gate_proj", "mlp.up_proj"},
                                             {"self_attn.o_proj", "mlp.down_proj"}}) {
    for (const bool bias_too : {false, true}) {
      SCOPED_TRACE(zeros.front() + (bias_too ? " and its bias" : ""));
      layer = whole;
      layer.for_each_linear([&](const std::string& name, Linear& linear) {
        if (std::find(zeros.begin(), zeros.end(), name) == zeros.end()) return;
        linear.weight = at::zeros_like(linear.weight);
        if (linear.bias.defined() && bias_too) linear.bias = at::zeros_like(linear.bias);
      });
      const DecoderLayer changed = balanced(kAll);
      expect_finite(changed);
      expect_kept(changed);
    }
  }
}

TEST_P(Balance, ValuesThatNothingReadsStayAsTheyAre) {
  layer.self_attn.o_proj.weight = at::zeros_like(layer.self_attn.o_proj.weight);
  EXPECT_TRUE(balance(layer, {Site::kValue}, inputs, weights).factors.empty());
  const DecoderLayer changed = balanced({Site::kValue});
  EXPECT_TRUE(at::equal(changed.self_attn.v_proj.weight, layer.self_attn.v_proj.weight));
}

TEST_P(Balance, TokensThatAreNotFiniteDoNotCount) {
  const auto of_windows = [&](const Tensor& windows) {
    return BlockInputs{.full_precision = windows, .quantized = windows, .rope = inputs.rope};
  };
  const Balanced expected =
      balance(layer, kAll, of_windows(x.narrow(0, 1, kSamples - 1)), weights.narrow(0, 1, kSamples - 1));
  Tensor broken = x.clone();
  broken[0] = std::numeric_limits<double>::quiet_NaN();
  const Balanced found = balance(layer, kAll, of_windows(broken), weights);
  EXPECT_TRUE(found.left_out.empty());
  const auto wanted = layer_tensors(realized(layer, expected.factors), "", at::kDouble);
  for (const auto& [name, tensor] : layer_tensors(realized(layer, found.factors), "", at::kDouble)) {
    EXPECT_TRUE(at::allclose(tensor, wanted.at(name), 1e-9, 1e-12)) << name;
  }
}

TEST_P(Balance, WhatHasNoFiniteMomentsIsLeftOut) {
  const DecoderLayer single = layer.to(at::kFloat);
  inputs = {.full_precision = x.to(at::kFloat),
            .quantized = x.to(at::kFloat),
            .rope = test::tiny_rope(shape, kSeq, at::kFloat)};
  weights = weights.to(at::kFloat);
  // Values whose squares leave the range of float32.
  constexpr double kLoud = 1e22;
  DecoderLayer loud = single;
  loud.mlp.up_proj.weight = loud.mlp.up_proj.weight * kLoud;
  Balanced found = balance(loud, kAll, inputs, weights);
  EXPECT_EQ(found.left_out, std::vector<Site>{Site::kDown});
  DecoderLayer changed = realized(loud, found.factors);
  EXPECT_TRUE(at::equal(changed.mlp.down_proj.weight, loud.mlp.down_proj.weight));
  EXPECT_FALSE(at::equal(changed.input_layernorm.weight, loud.input_layernorm.weight));
  loud = single;
  loud.self_attn.v_proj.weight = loud.self_attn.v_proj.weight * kLoud;
  found = balance(loud, {Site::kValue}, inputs, weights);
  EXPECT_EQ(found.left_out, std::vector<Site>{Site::kValue});
  changed = realized(loud, found.factors);
  EXPECT_TRUE(at::equal(changed.self_attn.v_proj.weight, loud.self_attn.v_proj.weight));
}

TEST_P(Balance, SitesWithoutAClosedFormAreRefused) {
  for (const Site site : {Site::kResidual, Site::kO}) {
    test::expect_error([&] { balance(layer, {site}, inputs, weights); },
                       {"balance", std::string(site_info(site).name)});
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, Balance, testing::ValuesIn(test::tiny_shapes()), test::shape_name);

TEST(GeometricMean, SolvesItsEquation) {
  const Tensor a = random_definite(3, 8, 1), b = random_definite(3, 8, 2);
  const Tensor x = geometric_mean(a, b);
  EXPECT_LT(test::relative_error(at::matmul(at::matmul(x, at::linalg_inv(a)), x), b), 1e-10);
  EXPECT_LT(test::relative_error(x.transpose(1, 2), x), 1e-12);
  EXPECT_GT(at::linalg_eigvalsh(x).min().item<double>(), 0);
  EXPECT_LT(test::relative_error(geometric_mean(b, a), x), 1e-9) << "A # B = B # A";
}

TEST(GeometricMean, OfDiagonalsIsTheirRoot) {
  const Tensor a = at::diag(at::tensor({1.0, 4.0, 9.0}, at::kDouble));
  const Tensor b = at::diag(at::tensor({4.0, 4.0, 1.0}, at::kDouble));
  const Tensor expected = at::diag(at::tensor({2.0, 4.0, 3.0}, at::kDouble));
  EXPECT_LT(test::relative_error(geometric_mean(a, b), expected), 1e-12);
}

TEST(TokenWeights, HaveMeanOneAndInverseEnergy) {
  const Tensor target = test::random_normal({3, 5, 16}, 1) * (1 + at::arange(15, at::kDouble).view({3, 5, 1}));
  EXPECT_TRUE(
      at::equal(token_weights(target, Recipe::TokenWeights::kUniform, at::kDouble), at::ones({3, 5}, at::kDouble)));
  const Tensor weights = token_weights(target, Recipe::TokenWeights::kInverseEnergy, at::kDouble);
  EXPECT_NEAR(weights.mean().item<double>(), 1.0, 1e-12);
  const Tensor product = weights * target.square().mean(-1);
  EXPECT_NEAR((product.max() / product.min()).item<double>(), 1.0, 1e-10);
}

TEST(TokenWeights, ATokenThatIsNotFiniteCountsNothing) {
  const Tensor target = test::random_normal({3, 5, 16}, 1);
  for (const double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    Tensor broken = target.clone();
    broken[1][2][7] = bad;
    for (const auto kind : {Recipe::TokenWeights::kUniform, Recipe::TokenWeights::kInverseEnergy}) {
      const Tensor weights = token_weights(broken, kind, at::kDouble), whole = token_weights(target, kind, at::kDouble);
      EXPECT_EQ(weights[1][2].item<double>(), 0);
      EXPECT_EQ(weights.eq(0).sum().item<int64_t>(), 1);
      EXPECT_NEAR(weights.sum().item<double>(), 14, 1e-12);
      // The others among themselves as without it.
      const Tensor ratio = weights.flatten().narrow(0, 0, 7) / whole.flatten().narrow(0, 0, 7);
      EXPECT_NEAR((ratio.max() / ratio.min()).item<double>(), 1, 1e-12);
      const Tensor none = token_weights(at::full_like(target, bad), kind, at::kDouble);
      EXPECT_TRUE(at::equal(none, at::zeros({3, 5}, at::kDouble)));
    }
  }
}

TEST(DropTokens, LeavesFiniteTensorsAlone) {
  Tensor x = test::random_normal({6, 4}, 1), other = test::random_normal({6, 3}, 2), weights = at::ones({6, 1}), none;
  const Tensor x_before = x, weights_before = weights;
  EXPECT_FALSE(drop_tokens_not_finite({&x, &none, &other}, weights).defined());
  EXPECT_TRUE(x.is_same(x_before) && weights.is_same(weights_before));
  other = other.clone();
  other[4][1] = std::numeric_limits<double>::quiet_NaN();
  EXPECT_EQ(drop_tokens_not_finite({&x, &none, &other}, weights).item<double>(), 1);
  EXPECT_EQ(weights.sum().item<double>(), 5);
  EXPECT_EQ(x[4].abs().sum().item<double>() + other[4].abs().sum().item<double>(), 0);
  EXPECT_TRUE(at::equal(x.narrow(0, 0, 4), x_before.narrow(0, 0, 4)));
}

TEST(MeasureBlock, FindsTheWeightedMomentsOfEveryPoint) {
  const TinyShape shape;
  const DecoderLayer layer = test::tiny_layer(shape, 1);
  // More tokens than one batch holds.
  const int64_t samples = 5, seq = 600;
  const Tensor x = test::random_normal({samples, seq, shape.hidden_size}, 1) + 0.5;
  const Tensor weights = test::random_normal({samples, seq}, 2).abs();
  const RotaryEmbedding rope = test::tiny_rope(shape, seq);
  const BlockMoments moments = measure_block(layer, x, rope, weights, {.with_o_covariance = true});
  const Tensor w = (weights / weights.sum()).reshape({-1, 1});
  const auto expect_moments = [&](const Moments& got, const Tensor& seen) {
    const Tensor flat = seen.flatten(0, 1), mean = (flat * w).sum(0);
    const Tensor covariance = at::matmul(((flat - mean) * w).t(), flat - mean);
    EXPECT_LT(test::relative_error(got.mean, mean), 1e-10);
    EXPECT_LT(test::relative_error(got.variance, covariance.diagonal()), 1e-10);
    if (got.covariance.defined()) {
      EXPECT_LT(test::relative_error(got.covariance, covariance), 1e-10);
    }
  };
  const Tensor qkv = layer.input_of(Site::kQkv, x, rope);
  const Tensor keys = layer.self_attn.k_proj.forward(qkv).view({samples, seq, shape.num_kv_heads, shape.head_dim});
  expect_moments(moments.at(Site::kQkv), qkv);
  expect_moments(moments.at(Site::kO), layer.input_of(Site::kO, x, rope));
  expect_moments(moments.at(Site::kGateUp), layer.input_of(Site::kGateUp, x, rope));
  expect_moments(moments.at(Site::kDown), layer.input_of(Site::kDown, x, rope));
  expect_moments(moments.query, layer.self_attn.q_proj.forward(qkv));
  expect_moments(moments.at(Site::kQueryKey), rope.forward(keys).flatten(2));
  expect_moments(moments.at(Site::kValue), layer.self_attn.v_proj.forward(qkv));
  EXPECT_TRUE(moments.at(Site::kO).covariance.defined());
  EXPECT_FALSE(moments.at(Site::kQkv).covariance.defined());
}

}  // namespace
}  // namespace baseq
