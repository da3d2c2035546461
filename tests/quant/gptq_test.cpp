#include "baseq/quant/gptq.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "../io/temp_directory.h"
#include "quant/input_factor.h"

namespace baseq {
namespace {

const auto kF64 = at::TensorOptions().dtype(at::kDouble);

/// Inputs whose channels share a few directions, as activations do.
Tensor correlated_inputs(int64_t tokens, int64_t features) {
  const Tensor mixing = at::randn({features, features}) * at::logspace(0, -1.5, features).unsqueeze(1);
  return at::mm(at::randn({tokens, features}), mixing);
}

Tensor hessian_of(const Tensor& x) {
  Hessian hessian(x.size(-1));
  hessian.add(x);
  return hessian.mean();
}

double output_error(const QuantizedWeight& quantized, const Tensor& weight, const Tensor& x) {
  return at::mm(x, (quantized.dequantized() - weight).t()).square().mean().item<double>();
}

/// GPTQ as the paper states it, with the inverse of the Hessian, in float64 and one element at a time.
Tensor reference_gptq(const Tensor& weight, const Tensor& hessian, const QuantSpec& spec, const QParams& qparams,
                      const GptqOptions& options, const Tensor& cross = {}) {
  const int64_t rows = weight.size(0), columns = weight.size(1);
  Tensor order = at::arange(columns);
  if (options.activation_order) {
    order = at::argsort(hessian.diagonal(), /*stable=*/true, /*dim=*/0, /*descending=*/true);
  }
  Tensor h = hessian.clone();
  h.diagonal().add_(options.damping * hessian.diagonal().mean());
  h = h.index_select(0, order).index_select(1, order);
  const Tensor upper = at::linalg_cholesky(at::linalg_inv(h), /*upper=*/true).contiguous();
  Tensor p = at::zeros_like(h);
  if (cross.defined()) {
    const Tensor d = cross.index_select(0, order).index_select(1, order);
    p = (options.cross_strength * at::mm(at::mm(d, upper.t()).triu(1), upper)).contiguous();
  }
  const Tensor original = weight.to(at::kDouble).index_select(1, order).contiguous(), w = original.clone();
  const Tensor codes = at::empty({rows, columns}, at::kChar);
  const Tensor scale = qparams.scale.to(at::kDouble).expand({rows, qparams.scale.size(1)}).contiguous();
  const Tensor zero = qparams.zero_point.defined() ? qparams.zero_point.to(at::kDouble).expand_as(scale).contiguous()
                                                   : at::zeros_like(scale);
  auto wa = w.accessor<double, 2>();
  const auto oa = original.accessor<double, 2>(), ua = upper.accessor<double, 2>(), pa = p.accessor<double, 2>(),
             sa = scale.accessor<double, 2>(), za = zero.accessor<double, 2>();
  auto ca = codes.accessor<int8_t, 2>();
  const double low = -std::ldexp(1, static_cast<int>(spec.num_bits) - 1);
  const int64_t group_size = columns / qparams.scale.size(1);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < columns; ++i) {
      const int64_t column = order[i].item<int64_t>(), group = column / group_size;
      const double s = sa[row][group], z = za[row][group];
      // In float32, because the largest magnitude of a symmetric row sits on a tie of rounding.
      const float position = static_cast<float>(wa[row][i]) / static_cast<float>(s) + static_cast<float>(z);
      const double code = std::clamp(std::nearbyint(static_cast<double>(position)), low, -low - 1);
      ca[row][column] = static_cast<int8_t>(code);
      const double distance = wa[row][i] - oa[row][i];
      const double error = (wa[row][i] - (code - z) * s - options.first_order * distance) / ua[i][i];
      for (int64_t j = i + 1; j < columns; ++j) wa[row][j] += -error * ua[i][j] + oa[row][i] * pa[i][j];
      // FOEM's pull of the next column, which a block's border does not stop.
      if (i + 1 < columns) wa[row][i + 1] -= options.first_order * (wa[row][i + 1] - oa[row][i + 1]);
    }
  }
  return codes;
}

TEST(Gptq, HessianIsTheMeanOfTheProducts) {
  at::manual_seed(1);
  const Tensor x = at::randn({3, 1500, 24}) * 3 + 1;
  Hessian hessian(24);
  hessian.add(x.slice(0, 0, 1));
  hessian.add(x.slice(0, 1).to(at::kFloat));
  EXPECT_EQ(hessian.num_tokens(), 4500);
  const Tensor rows = x.reshape({-1, 24}).to(at::kDouble);
  EXPECT_EQ(hessian.mean().scalar_type(), at::kDouble);
  EXPECT_TRUE(at::allclose(hessian.mean(), at::mm(rows.t(), rows) / 4500, 1e-5, 1e-5));
  EXPECT_THROW(hessian.add(at::randn({2, 23})), c10::Error);
  EXPECT_THROW(Hessian(4).mean(), c10::Error);
}

TEST(Gptq, IdentityHessianIsRoundToNearest) {
  at::manual_seed(2);
  const Tensor weight = at::randn({37, 96});
  for (const Strategy strategy : {Strategy::kTensor, Strategy::kChannel, Strategy::kGroup}) {
    for (const bool symmetric : {true, false}) {
      for (const bool mse_clip : {true, false}) {
        const QuantSpec spec{.num_bits = 3, .symmetric = symmetric, .strategy = strategy, .group_size = 32};
        const GptqResult result = gptq(weight, at::eye(96, kF64), spec, {.block_size = 40, .mse_clip = mse_clip});
        const QuantizedWeight expected = round_to_nearest(weight, spec, mse_clip);
        EXPECT_TRUE(at::equal(result.weight.codes, expected.codes));
        EXPECT_TRUE(at::equal(result.weight.qparams.scale, expected.qparams.scale));
        EXPECT_FALSE(result.fell_back_to_rtn);
        const double error = (expected.dequantized() - weight).square().sum().item<double>();
        EXPECT_NEAR(result.relative_error, error / weight.square().sum().item<double>(), 1e-5);
      }
    }
  }
}

TEST(Gptq, CodesEqualTheReferenceWithTheInverseHessian) {
  at::manual_seed(3);
  const Tensor weight = at::randn({45, 80}), hessian = hessian_of(correlated_inputs(400, 80));
  for (const Strategy strategy : {Strategy::kTensor, Strategy::kChannel, Strategy::kGroup}) {
    for (const bool symmetric : {true, false}) {
      for (const bool activation_order : {true, false}) {
        for (const int64_t block_size : {1, 24, 80, 128}) {
          const QuantSpec spec{.num_bits = 4, .symmetric = symmetric, .strategy = strategy, .group_size = 16};
          const GptqOptions options{.block_size = block_size, .activation_order = activation_order, .mse_clip = false};
          const GptqResult result = gptq(weight, hessian, spec, options);
          const Tensor expected = reference_gptq(weight, hessian, spec, compute_qparams(weight, spec), options);
          EXPECT_TRUE(at::equal(result.weight.codes, expected))
              << (result.weight.codes != expected).sum().item<int64_t>() << " codes differ, strategy "
              << static_cast<int>(strategy) << ", block " << block_size;
          EXPECT_EQ(result.damping, options.damping);
        }
      }
    }
  }
}

TEST(Gptq, FirstOrderTermsEqualTheReferenceAcrossBordersOfBlocks) {
  at::manual_seed(21);
  const Tensor weight = at::randn({45, 80}), hessian = hessian_of(correlated_inputs(400, 80));
  for (const double first_order : {0.05, 0.2, 1.0}) {
    for (const bool activation_order : {true, false}) {
      for (const int64_t block_size : {1, 24, 80, 128}) {
        const QuantSpec spec{.num_bits = 3, .symmetric = false, .strategy = Strategy::kGroup, .group_size = 16};
        const GptqOptions options{.block_size = block_size,
                                  .activation_order = activation_order,
                                  .mse_clip = false,
                                  .first_order = first_order};
        const GptqResult result = gptq(weight, hessian, spec, options);
        const Tensor expected = reference_gptq(weight, hessian, spec, compute_qparams(weight, spec), options);
        EXPECT_TRUE(at::equal(result.weight.codes, expected))
            << (result.weight.codes != expected).sum().item<int64_t>() << " codes differ, beta " << first_order
            << ", block " << block_size;
        const Tensor error = result.weight.dequantized() - weight;
        EXPECT_NEAR(result.relative_error, quadratic_form(error, hessian) / quadratic_form(weight, hessian), 1e-6);
      }
    }
  }
  EXPECT_THROW(gptq(weight, hessian, {}, {.first_order = 1.5}), c10::Error);
}

TEST(Gptq, AFirstOrderTermOfOneIsRoundToNearest) {
  // All of the distance is taken back before a column is rounded.
  at::manual_seed(22);
  const Tensor weight = at::randn({17, 64}), hessian = hessian_of(correlated_inputs(400, 64));
  const QuantSpec spec{.num_bits = 4};
  const GptqResult result = gptq(weight, hessian, spec, {.mse_clip = false, .first_order = 1});
  EXPECT_TRUE(at::equal(result.weight.codes, round_to_nearest(weight, spec).codes));
}

TEST(Gptq, ManyColumnsAreMadeUpForInTwoLevels) {
  at::manual_seed(17);
  const int64_t columns = 1184;  // more than one outer block, and a factor in float32
  const Tensor weight = at::randn({6, columns}), x = correlated_inputs(2 * columns, columns), hessian = hessian_of(x);
  for (const bool activation_order : {true, false}) {
    for (const int64_t block_size : {128, 96}) {
      const QuantSpec spec{.num_bits = 4, .strategy = Strategy::kGroup, .group_size = 37};
      const GptqOptions options{.block_size = block_size, .activation_order = activation_order, .mse_clip = false};
      const GptqResult result = gptq(weight, hessian, spec, options);
      const Tensor expected = reference_gptq(weight, hessian, spec, compute_qparams(weight, spec), options);
      // A code on a tie changes those behind it, so not all rows are equal.
      const QuantizedWeight reference{spec, expected, compute_qparams(weight, spec)};
      EXPECT_NEAR(output_error(result.weight, weight, x) / output_error(reference, weight, x), 1, 0.02);
      EXPECT_LT((result.weight.codes != expected).to(at::kDouble).mean().item<double>(), 0.05);
      EXPECT_EQ(result.damping, options.damping);
    }
  }
}

TEST(Gptq, OutputErrorIsLowerThanThatOfRoundToNearest) {
  at::manual_seed(4);
  const Tensor x = correlated_inputs(1000, 128), weight = at::randn({64, 128});
  const Tensor hessian = hessian_of(x);
  for (const int64_t num_bits : {2, 3, 4}) {
    const QuantSpec spec{.num_bits = num_bits};
    const GptqResult result = gptq(weight, hessian, spec);
    const double nearest = output_error(round_to_nearest(weight, spec, /*mse_clip=*/true), weight, x);
    EXPECT_LT(output_error(result.weight, weight, x), 0.6 * nearest);
  }
}

TEST(Gptq, RelativeErrorIsTheErrorOfTheOutput) {
  at::manual_seed(5);
  const Tensor x = correlated_inputs(700, 600), weight = at::randn({20, 600});
  const GptqResult result = gptq(weight, hessian_of(x), {.num_bits = 4});
  const double expected = output_error(result.weight, weight, x) / at::mm(x, weight.t()).square().mean().item<double>();
  EXPECT_NEAR(result.relative_error, expected, 1e-4 * expected);
}

TEST(Gptq, GroupParametersOnTheWayFollowTheCorrectedWeights) {
  at::manual_seed(6);
  const Tensor x = correlated_inputs(600, 96), weight = at::randn({24, 96});
  const QuantSpec spec{.num_bits = 3, .strategy = Strategy::kGroup, .group_size = 24};
  const GptqOptions options{.block_size = 32, .activation_order = false, .static_groups = false, .mse_clip = false};
  const GptqResult result = gptq(weight, hessian_of(x), spec, options);
  // The first group has nothing to make up for; with its parameters known the codes are those of the reference.
  EXPECT_TRUE(at::allclose(result.weight.qparams.scale.select(1, 0), compute_qparams(weight, spec).scale.select(1, 0)));
  EXPECT_FALSE(at::allclose(result.weight.qparams.scale, compute_qparams(weight, spec).scale));
  EXPECT_TRUE(
      at::equal(result.weight.codes, reference_gptq(weight, hessian_of(x), spec, result.weight.qparams, options)));
  EXPECT_THROW(gptq(weight, hessian_of(x), spec, {.activation_order = true, .static_groups = false}), c10::Error);
}

TEST(Gptq, SingularHessianIsDampedUntilItFactors) {
  at::manual_seed(7);
  const Tensor x = at::mm(at::randn({500, 3}), at::randn({3, 64})), weight = at::randn({16, 64});
  const GptqResult result = gptq(weight, hessian_of(x), {.num_bits = 4}, {.damping = 0});
  EXPECT_FALSE(result.fell_back_to_rtn);
  EXPECT_GE(result.damping, 1e-4);
  EXPECT_LT(output_error(result.weight, weight, x),
            output_error(round_to_nearest(weight, {.num_bits = 4}, true), weight, x));
}

TEST(Gptq, IndefiniteHessianIsFlagged) {
  at::manual_seed(8);
  Tensor hessian = at::eye(8, kF64);
  hessian[0][1] = hessian[1][0] = 1e3;
  const Tensor weight = at::randn({4, 8});
  const GptqResult result = gptq(weight, hessian, {.num_bits = 4});
  EXPECT_TRUE(result.fell_back_to_rtn);
  EXPECT_TRUE(at::equal(result.weight.codes, round_to_nearest(weight, {.num_bits = 4}, true).codes));
}

TEST(Gptq, NotANumberInTheHessianIsRefused) {
  const Tensor weight = at::ones({4, 8});
  for (const double bad : {std::nan(""), std::numeric_limits<double>::infinity()}) {
    Tensor hessian = at::eye(8, kF64);
    hessian[3][4] = hessian[4][3] = bad;
    test::expect_error([&] { gptq(weight, hessian, {.num_bits = 4}); }, {"gptq: hessian", "not finite"});
    test::expect_error([&] { gptq(weight, hessian.t().to(at::kFloat), {.num_bits = 4}); }, {"gptq: hessian"});
  }
}

TEST(Gptq, SumsThatOverflowedFallBackInARun) {
  at::manual_seed(9);
  const Tensor weight = at::randn({4, 8});
  for (const double bad : {std::nan(""), std::numeric_limits<double>::infinity()}) {
    Tensor hessian = at::eye(8, kF64);
    hessian[3][4] = hessian[4][3] = bad;
    const GptqResult result = gptq(weight, factor_moments(hessian, {}), {.num_bits = 4}, {});
    EXPECT_TRUE(result.fell_back_to_rtn);
    const QuantizedWeight nearest = round_to_nearest(weight, {.num_bits = 4}, true);
    EXPECT_TRUE(at::equal(result.weight.codes, nearest.codes));
    const Tensor error = nearest.dequantized() - weight;
    EXPECT_NEAR(result.relative_error, (error.square().sum() / weight.square().sum()).item<double>(), 1e-6);
  }
}

TEST(Gptq, DeadColumnsAreRoundedOnTheirOwn) {
  at::manual_seed(10);
  Tensor x = correlated_inputs(500, 48);
  x.select(1, 5).zero_();
  x.select(1, 40).zero_();
  const Tensor weight = at::randn({12, 48});
  const QuantSpec spec{.num_bits = 4};
  const GptqResult result = gptq(weight, hessian_of(x), spec);
  const QuantizedWeight nearest = round_to_nearest(weight, spec, true);
  EXPECT_FALSE(result.fell_back_to_rtn);
  for (const int64_t column : {5, 40}) {
    EXPECT_TRUE(at::equal(result.weight.codes.select(1, column), nearest.codes.select(1, column)));
  }
  EXPECT_LT(output_error(result.weight, weight, x), output_error(nearest, weight, x));
  EXPECT_TRUE(std::isfinite(gptq(weight, at::zeros({48, 48}, kF64), spec).relative_error));
}

/// `matrix` with `count` rows and columns of zeros behind its own.
Tensor padded(const Tensor& matrix, int64_t count) {
  const int64_t n = matrix.size(0);
  const Tensor result = at::zeros({n + count, n + count}, matrix.options());
  result.narrow(0, 0, n).narrow(1, 0, n).copy_(matrix);
  return result;
}

TEST(Gptq, DeadInputsChangeNothingForTheOthers) {
  at::manual_seed(14);
  for (int repetition = 0; repetition < 4; ++repetition) {
    const int64_t rows = at::randint(1, 40, {1}).item<int64_t>(), groups = at::randint(1, 6, {1}).item<int64_t>();
    const int64_t columns = 16 * groups, dead = 16 * at::randint(1, 20, {1}).item<int64_t>();
    // As quiet as the inputs of a down_proj: beside them a one is loud.
    const Tensor x = 0.01 * correlated_inputs(200, columns), weight = at::randn({rows, columns});
    const Tensor full = x + at::randn(x.sizes()) * 0.2 * x.std();
    const Tensor hessian = hessian_of(x), cross = at::mm((full - x).t(), x).to(at::kDouble) / 200;
    const Tensor wide = at::cat({weight, at::zeros({rows, dead})}, 1);
    for (const Strategy strategy : {Strategy::kTensor, Strategy::kChannel, Strategy::kGroup}) {
      for (const bool symmetric : {true, false}) {
        for (const bool activation_order : {true, false}) {
          const QuantSpec spec{.num_bits = 4, .symmetric = symmetric, .strategy = strategy, .group_size = 16};
          GptqOptions options{.activation_order = activation_order};
          options.static_groups = activation_order || repetition % 2 == 0;
          for (const bool compensated : {false, true}) {
            const GptqResult alone = gptq(weight, hessian, spec, options, compensated ? cross : Tensor());
            const GptqResult beside =
                gptq(wide, padded(hessian, dead), spec, options, compensated ? padded(cross, dead) : Tensor());
            EXPECT_TRUE(at::equal(beside.weight.codes.slice(1, 0, columns), alone.weight.codes))
                << (beside.weight.codes.slice(1, 0, columns) != alone.weight.codes).sum().item<int64_t>()
                << " codes differ of " << alone.weight.codes.sizes() << ", " << dead << " dead inputs";
            EXPECT_EQ(beside.damping, alone.damping);
            EXPECT_NEAR(beside.relative_error, alone.relative_error, 1e-5);
          }
        }
      }
    }
  }
}

TEST(Gptq, PivotsOfRoundingErrorsAreNoFactor) {
  // One token fewer than features: the last pivot is zero up to rounding, above or below.
  for (uint64_t seed = 0; seed < 20; ++seed) {
    at::manual_seed(seed);
    const Tensor x = at::randn({31, 32}, kF64), weight = at::randn({8, 32});
    const GptqResult result = gptq(weight, at::mm(x.t(), x) / 31, {.num_bits = 4}, {.damping = 0});
    EXPECT_FALSE(result.fell_back_to_rtn) << seed;
    EXPECT_GE(result.damping, 1e-4) << seed;
  }
  // Exactly definite, with a feedback of 1e50.
  const Tensor steep = at::tensor({2.0, 1e-50, 1e-50, 1e-100}, kF64).view({2, 2});
  for (const bool activation_order : {true, false}) {
    const GptqResult result =
        gptq(at::randn({8, 2}), steep, {.num_bits = 4}, {.damping = 0, .activation_order = activation_order});
    EXPECT_GE(result.damping, 1e-4);
    EXPECT_TRUE(std::isfinite(result.relative_error));
  }
}

TEST(Gptq, QuietInputsNeedNoDamping) {
  at::manual_seed(15);
  const Tensor loudness = at::logspace(0, -7, 48, 10, kF64), x = at::randn({500, 48}, kF64) * loudness;
  const GptqResult result = gptq(at::randn({8, 48}), at::mm(x.t(), x) / 500, {.num_bits = 4}, {.damping = 0});
  EXPECT_EQ(result.damping, 0);
  EXPECT_FALSE(result.fell_back_to_rtn);
}

TEST(Gptq, BlocksAreNoWiderThanTheWeight) {
  at::manual_seed(16);
  const Tensor weight = at::randn({1 << 16, 8}), hessian = hessian_of(correlated_inputs(100, 8));
  const GptqOptions options{.mse_clip = false};
  GptqOptions wide = options;
  wide.block_size = 1 << 24;
  EXPECT_TRUE(at::equal(gptq(weight, hessian, {}, wide).weight.codes, gptq(weight, hessian, {}, options).weight.codes));
}

TEST(Gptq, CrossTermEqualsTheReferenceColumnLoop) {
  at::manual_seed(11);
  const Tensor x = correlated_inputs(600, 64), weight = at::randn({24, 64});
  const Tensor full = x + at::randn({600, 64}) * 0.2 * x.std() + 0.05 * x.roll(1, 1);
  const Tensor hessian = hessian_of(x);
  const Tensor cross = at::mm((full - x).t(), x).to(at::kDouble) / 600;
  for (const bool activation_order : {true, false}) {
    const GptqOptions options{
        .block_size = 16, .activation_order = activation_order, .mse_clip = false, .cross_strength = 0.5};
    const QuantSpec spec{.num_bits = 4};
    EXPECT_TRUE(at::equal(gptq(weight, hessian, spec, options, cross).weight.codes,
                          reference_gptq(weight, hessian, spec, compute_qparams(weight, spec), options, cross)));
  }
}

TEST(Gptq, CrossTermBringsTheOutputCloserToThatOfTheFullPrecisionInputs) {
  at::manual_seed(12);
  const Tensor full = correlated_inputs(2000, 96), weight = at::randn({48, 96});
  // What an earlier layer's rounding leaves: a little less of the signal and some noise.
  const Tensor x = full * (at::rand({96}) * 0.3 + 0.75) + at::randn({2000, 96}) * 0.1;
  const Tensor hessian = hessian_of(x), cross = at::mm((full - x).t(), x).to(at::kDouble) / 2000;
  const auto error = [&](const GptqResult& result) {
    return (at::mm(x, result.weight.dequantized().t()) - at::mm(full, weight.t())).square().mean().item<double>();
  };
  const QuantSpec spec{.num_bits = 4};
  const double without = error(gptq(weight, hessian, spec));
  const double quarter = error(gptq(weight, hessian, spec, {}, cross));
  const double whole = error(gptq(weight, hessian, spec, {.cross_strength = 1}, cross));
  EXPECT_LT(quarter, without);
  EXPECT_LT(whole, quarter);
}

TEST(Gptq, ScaleDtypeAndWeightTypeAreRespected) {
  at::manual_seed(13);
  const Tensor weight = at::randn({8, 32}).to(at::kBFloat16);
  const QuantSpec spec{.num_bits = 4, .scale_dtype = at::kBFloat16};
  const GptqResult result = gptq(weight, hessian_of(correlated_inputs(100, 32)), spec);
  EXPECT_TRUE(at::equal(result.weight.qparams.scale, result.weight.qparams.scale.to(at::kBFloat16).to(at::kFloat)));
  EXPECT_EQ(result.weight.dequantized().scalar_type(), at::kFloat);
}

TEST(Gptq, ThrowsOnWrongShapesAndValues) {
  const Tensor weight = at::randn({4, 8});
  EXPECT_THROW(gptq(weight, at::eye(7, kF64), {}), c10::Error);
  EXPECT_THROW(gptq(weight, at::eye(8, kF64), {}, {}, at::eye(7, kF64)), c10::Error);
  EXPECT_THROW(gptq(weight.view({-1}), at::eye(8, kF64), {}), c10::Error);
  EXPECT_THROW(gptq(weight, at::eye(8, kF64), {.strategy = Strategy::kGroup, .group_size = 3}), c10::Error);
  EXPECT_THROW(gptq(weight / 0, at::eye(8, kF64), {}), c10::Error);
  EXPECT_THROW(round_to_nearest(at::zeros({4, 8}, at::kInt), {}), c10::Error);
  EXPECT_THROW(round_to_nearest(weight / 0, {}), c10::Error);
  // Grids of activations, whose ranges come from each row as it passes.
  for (const QuantSpec& spec : {QuantSpec{.dynamic = true}, QuantSpec{.strategy = Strategy::kToken}}) {
    EXPECT_THROW(gptq(weight, at::eye(8, kF64), spec), c10::Error);
    EXPECT_THROW(round_to_nearest(weight, spec), c10::Error);
  }
}

}  // namespace
}  // namespace baseq
