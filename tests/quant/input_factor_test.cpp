#include "../../src/quant/input_factor.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "../../src/quant/product.h"

namespace baseq {
namespace {

/// Inputs whose channels share directions that fall off to `last` of the first, as activations do.
Tensor inputs_of(int64_t tokens, int64_t features, double last = -1.5) {
  const Tensor mixing =
      at::randn({features, features}, at::kDouble) * at::logspace(0, last, features, 10, at::kDouble).unsqueeze(1);
  return at::mm(at::randn({tokens, features}, at::kDouble), mixing) / std::sqrt(static_cast<double>(tokens));
}

/// R of H + A by LAPACK.
Tensor reference_factor(const Tensor& h, const InputFactor& factor) {
  Tensor damped = h.index_select(0, factor.order).index_select(1, factor.order);
  damped.diagonal().add_(factor.added.to(at::kDouble));
  return at::linalg_cholesky(damped.flip({0, 1})).flip({0, 1});
}

void expect_factor(const InputFactor& factor, const Tensor& upper, double tolerance) {
  ASSERT_TRUE(factor.defined());
  const Tensor root = upper.diagonal();
  EXPECT_TRUE(at::allclose(factor.pivots.to(at::kDouble), root.square(), tolerance, 0));
  const Tensor feedback = factor.tokens.defined()
                              ? at::mm(factor.responses.to(at::kDouble), factor.tokens.to(at::kDouble))
                              : factor.feedback.to(at::kDouble);
  const Tensor expected = (upper / root).t().tril(-1);
  EXPECT_LT((feedback.tril(-1) - expected).abs().max().item<double>(), tolerance * expected.abs().max().item<double>());
}

TEST(InputFactor, IsTheFactorOfTheDampedMomentsInBothTypes) {
  at::manual_seed(1);
  for (const int64_t features : {7, 512, 1100}) {  // the last one in float32, in three blocks
    const Tensor x = inputs_of(2 * features, features), h = at::mm(x.t(), x);
    for (const bool activation_order : {true, false}) {
      const InputFactor factor = factor_moments(h, {.activation_order = activation_order});
      EXPECT_EQ(factor.damping, 0.01);
      expect_factor(factor, reference_factor(h, factor), features > 512 ? 1e-3 : 1e-6);
      EXPECT_TRUE(
          at::equal(factor.order, activation_order ? at::argsort(h.diagonal(), true, 0, true) : at::arange(features)));
    }
  }
}

TEST(InputFactor, PivotsThatFloat32WouldDrownAreLeftToFloat64) {
  at::manual_seed(2);
  const Tensor x = inputs_of(1200, 600, -6), h = at::mm(x.t(), x);
  const InputFactor factor = factor_moments(h, {.damping = 1e-9});
  EXPECT_EQ(factor.damping, 1e-9);
  expect_factor(factor, reference_factor(h, factor), 1e-5);
}

TEST(InputFactor, NeedsMoreDampingWhereMomentsOfManyColumnsAreSingular) {
  at::manual_seed(3);
  const Tensor x = inputs_of(100, 700);
  const InputFactor factor = factor_moments(at::mm(x.t(), x), {.damping = 0});
  EXPECT_TRUE(factor.defined());
  EXPECT_GE(factor.damping, 1e-4);
}

TEST(InputFactor, TokensGiveTheFactorOfTheirMoments) {
  at::manual_seed(4);
  for (const int64_t features : {40, 300, 513}) {
    for (const int64_t num_tokens : {1, 9, 64}) {
      Tensor x = inputs_of(num_tokens, features).to(at::kFloat).to(at::kDouble);
      x.select(1, features / 3).zero_();
      for (const double damping : {0.01, 1e-3}) {
        const GptqOptions options{.damping = damping, .activation_order = num_tokens != 9};
        const InputFactor factor = factor_tokens(x.to(at::kFloat), options);
        expect_factor(factor, reference_factor(at::mm(x.t(), x), factor), 2e-5);
      }
    }
  }
}

TEST(InputFactor, TokensGiveTheCodesOfTheirMoments) {
  at::manual_seed(5);
  for (const int64_t columns : {96, 336, 1056}) {
    // In many rows ties that fall differently leave the error of all alike.
    const int64_t num_tokens = columns / 6, rows = columns > 512 ? 200 : 50;
    Tensor x = inputs_of(num_tokens, columns).to(at::kFloat);
    x.select(1, 5).zero_();
    const Tensor weight = at::randn({rows, columns}), wide = x.to(at::kDouble), h = at::mm(wide.t(), wide);
    for (const Strategy strategy : {Strategy::kTensor, Strategy::kChannel, Strategy::kGroup}) {
      for (const bool activation_order : {true, false}) {
        for (const bool symmetric : {true, false}) {
          const QuantSpec spec{.num_bits = 4, .symmetric = symmetric, .strategy = strategy, .group_size = 48};
          GptqOptions options{.activation_order = activation_order, .mse_clip = symmetric};
          options.static_groups = activation_order || symmetric;
          const InputFactor moments = factor_moments(h, options), tokens = factor_tokens(x, options);
          EXPECT_TRUE(tokens.tokens.defined());
          EXPECT_FALSE(tokens.moments.defined());
          const GptqResult expected = gptq(weight, moments, spec, options), got = gptq(weight, tokens, spec, options);
          // Ties of rounding go either way, and what follows in their row with them; a factor in float32 moves more.
          const Tensor differ = (got.weight.codes != expected.weight.codes).any(1);
          EXPECT_LE(differ.sum().item<int64_t>(), columns > 512 ? rows : 1) << columns << " columns";
          const double error = expected.relative_error;
          EXPECT_NEAR(got.relative_error, error, (columns > 512 ? 1e-2 : 1e-3) * error);
          EXPECT_FALSE(got.fell_back_to_rtn);
          if (!options.static_groups) continue;
          EXPECT_TRUE(at::equal(got.weight.qparams.scale, expected.weight.qparams.scale));
        }
      }
    }
  }
}

TEST(InputFactor, TheLossOfTheColumnsIsTheErrorOfTheOutput) {
  at::manual_seed(6);
  const int64_t columns = 1300, rows = 33;
  const Tensor x = inputs_of(200, columns).to(at::kFloat), weight = at::randn({rows, columns});
  const Tensor wide = x.to(at::kDouble), h = at::mm(wide.t(), wide);
  for (const bool by_tokens : {true, false}) {
    const InputFactor factor = by_tokens ? factor_tokens(x, {}) : factor_moments(h, {});
    const GptqResult result = gptq(weight, factor, {.num_bits = 4}, {});
    const Tensor error = at::mm(wide, (result.weight.dequantized() - weight).to(at::kDouble).t());
    const double expected =
        (error.square().sum() / at::mm(wide, weight.to(at::kDouble).t()).square().sum()).item<double>();
    EXPECT_NEAR(result.relative_error, expected, 1e-3 * expected) << by_tokens;
  }
}

TEST(InputFactor, TokensAreForThoseWhoDamp) {
  EXPECT_TRUE(few_tokens(512, 4096, {}));
  EXPECT_FALSE(few_tokens(4096, 4096, {}));
  EXPECT_FALSE(few_tokens(512, 4096, {.damping = 0}));
  EXPECT_FALSE(factor_tokens(at::full({2, 9}, std::numeric_limits<float>::infinity()), {}).defined());
  EXPECT_TRUE(factor_tokens(at::zeros({2, 9}), {}).defined());
}

TEST(InputFactor, OneServesAllReaders) {
  at::manual_seed(7);
  const Tensor x = inputs_of(400, 64), h = at::mm(x.t(), x);
  const InputFactor factor = factor_moments(h, {});
  for (const int64_t rows : {1, 64, 130}) {
    const Tensor weight = at::randn({rows, 64});
    const GptqResult shared = gptq(weight, factor, {}, {}), alone = gptq(weight, h, {});
    EXPECT_TRUE(at::equal(shared.weight.codes, alone.weight.codes));
    EXPECT_EQ(shared.relative_error, alone.relative_error);
  }
}

}  // namespace
}  // namespace baseq
