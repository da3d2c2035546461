#include "baseq/quant/low_rank.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "../tiny_model.h"
#include "baseq/quant/gptq.h"

namespace baseq {
namespace {

using test::expect_error;
using test::random_normal;
using test::relative_error;

/// Inputs whose channels share a few directions and have outliers.
Tensor inputs(int64_t tokens, int64_t features, uint64_t seed = 1) {
  Tensor x = at::mm(random_normal({tokens, features}, seed),
                    random_normal({features, features}, seed + 1) * at::logspace(0, -1.5, features).unsqueeze(1));
  x.slice(1, 0, 3).mul_(20);
  return x;
}

Tensor second_moments(int64_t tokens, int64_t features, uint64_t seed = 1) {
  const Tensor x = inputs(tokens, features, seed);
  return at::mm(x.t(), x) / tokens;
}

/// E = W - W_q of a rounded weight.
Tensor rounding_error(int64_t rows, int64_t columns, uint64_t seed = 3) {
  const Tensor weight = random_normal({rows, columns}, seed, at::kFloat);
  return (weight - round_to_nearest(weight, {.num_bits = 3}).dequantized()).to(at::kDouble);
}

double loss(const Tensor& error, const Tensor& moments) {
  return (at::mm(error, moments) * error).sum().item<double>();
}

double loss_after(const LowRankCorrection& correction, const Tensor& error, const Tensor& moments) {
  return loss(error - at::mm(correction.B, correction.A), moments);
}

/// Theorem 1 of QERA as it is written: C^T = R^{-1/2} SVD_k(R^{1/2} E^T).
Tensor qera_theorem(const Tensor& error, const Tensor& moments, int64_t rank) {
  const auto [values, vectors] = at::linalg_eigh(moments);
  const Tensor root = at::mm(vectors * values.sqrt(), vectors.t());
  const auto [u, s, v] = at::linalg_svd(at::mm(root, error.t()), /*full_matrices=*/false);
  const Tensor best = at::mm(u.narrow(1, 0, rank) * s.narrow(0, 0, rank), v.narrow(0, 0, rank));
  return at::linalg_solve(root, best).t();
}

struct Sides {
  int64_t rows, columns;
};
class EitherSide : public testing::TestWithParam<Sides> {
 protected:
  Tensor error = rounding_error(GetParam().rows, GetParam().columns);
  Tensor moments = second_moments(400, GetParam().columns);
};

TEST_P(EitherSide, IsTheoremOneOfQera) {
  const LowRankCorrection correction = reconstruct_error(error, moments, 5);
  EXPECT_EQ(correction.A.sizes(), at::IntArrayRef({5, error.size(1)}));
  EXPECT_EQ(correction.B.sizes(), at::IntArrayRef({error.size(0), 5}));
  EXPECT_LT(relative_error(at::mm(correction.B, correction.A), qera_theorem(error, moments, 5)), 1e-7);
  EXPECT_LT(relative_error(at::mm(correction.B.t(), correction.B), at::eye(5, at::kDouble)), 1e-12);
}

TEST_P(EitherSide, LossIsTheSumOfTheDiscardedEigenvalues) {
  const Tensor eigenvalues = at::linalg_eigvalsh(at::mm(at::mm(error, moments), error.t()));
  const double before = loss(error, moments);
  for (const int64_t rank : {1, 6, 20}) {
    const double discarded = eigenvalues.narrow(0, 0, error.size(0) - rank).sum().item<double>();
    const LowRankCorrection correction = reconstruct_error(error, moments, rank);
    EXPECT_NEAR(loss_after(correction, error, moments), discarded, 1e-9 * before) << rank;
    EXPECT_NEAR(correction.removed, before - discarded, 1e-9 * before) << rank;
  }
}

TEST_P(EitherSide, ExactIsBelowApproximateMagnitudesAndPlain) {
  const auto loss_with = [&](const Tensor& assumed) {
    return loss_after(reconstruct_error(error, assumed, 6), error, moments);
  };
  const double exact = loss_with(moments), approximate = loss_with(moments.diagonal());
  EXPECT_LT(exact, 0.98 * approximate);
  EXPECT_LT(exact, 0.98 * loss_with(inputs(400, error.size(1)).abs().mean(0).square()));  // L2QER
  EXPECT_LT(approximate, loss_with({}));
  EXPECT_LT(loss_with({}), loss(error, moments));
}

TEST_P(EitherSide, IdentityMomentsGiveTheTruncatedSvd) {
  const auto [u, s, v] = at::linalg_svd(error, /*full_matrices=*/false);
  const Tensor svd = at::mm(u.narrow(1, 0, 4) * s.narrow(0, 0, 4), v.narrow(0, 0, 4));
  const int64_t columns = error.size(1);
  for (const Tensor& identity :
       {Tensor(), at::ones({columns}, at::kDouble), at::eye(columns, at::kDouble), 3 * at::eye(columns, at::kDouble)}) {
    const LowRankCorrection correction = reconstruct_error(error, identity, 4);
    EXPECT_LT(relative_error(at::mm(correction.B, correction.A), svd), 1e-9);
  }
}

TEST_P(EitherSide, SingularMomentsOfFewTokensWork) {
  // The limit of moments that are made regular.
  const Tensor singular = second_moments(7, error.size(1));
  const LowRankCorrection correction = reconstruct_error(error, singular, 4);
  EXPECT_TRUE(correction.A.isfinite().all().item<bool>());
  const Tensor damped = singular + 1e-9 * singular.diagonal().mean() * at::eye(error.size(1), at::kDouble);
  EXPECT_NEAR(loss_after(correction, error, singular), loss(error - qera_theorem(error, damped, 4), singular),
              1e-5 * loss(error, singular));
  // Seven tokens ask no more than seven directions.
  EXPECT_NEAR(loss_after(reconstruct_error(error, singular, 7), error, singular), 0, 1e-9 * loss(error, singular));
}

TEST_P(EitherSide, TheWholeRankLeavesNothing) {
  const LowRankCorrection correction = reconstruct_error(error, moments, 1000);
  EXPECT_EQ(correction.A.size(0), std::min(error.size(0), error.size(1)));
  EXPECT_LT(relative_error(at::mm(correction.B, correction.A), error), 1e-9);
}

INSTANTIATE_TEST_SUITE_P(Shapes, EitherSide, testing::Values(Sides{24, 40}, Sides{40, 24}, Sides{32, 32}),
                         [](const auto& setting) {
                           return std::to_string(setting.param.rows) + "x" + std::to_string(setting.param.columns);
                         });

TEST(ReconstructError, NoErrorHasNoCorrection) {
  const LowRankCorrection correction = reconstruct_error(at::zeros({8, 12}, at::kDouble), second_moments(50, 12), 3);
  EXPECT_EQ(correction.A.abs().max().item<double>(), 0);
  EXPECT_EQ(correction.removed, 0);
}

TEST(ReconstructError, LargeErrorsComeWithinATinyShareOfTheOptimumSlow) {
  for (const auto& [rows, columns] : {Sides{1100, 1200}, Sides{1300, 1100}}) {
    const Tensor error = rounding_error(rows, columns), moments = second_moments(3000, columns);
    const Tensor eigenvalues = at::linalg_eigvalsh(at::mm(at::mm(error, moments), error.t()));
    for (const int64_t rank : {1, 16}) {
      const double least = eigenvalues.narrow(0, 0, rows - rank).sum().item<double>();
      const double got = loss_after(reconstruct_error(error, moments, rank), error, moments);
      EXPECT_GE(got, least * (1 - 1e-9));
      EXPECT_LE(got, least * (1 + 1e-4)) << rank;
    }
  }
}

TEST(StoreFactors, CodesAreWithinHalfAStepOfEveryRankAndFloatsAreCast) {
  // Ranks of very different size: one scale for all would lose the small ones.
  const Tensor size = at::logspace(0, -4, 5).to(at::kFloat);
  const Tensor a = random_normal({5, 33}, 1, at::kFloat) * size.unsqueeze(1);
  const Tensor b = random_normal({17, 5}, 2, at::kFloat) * size;
  const LowRankFactors codes = store_factors(a, b, at::kChar);
  EXPECT_EQ(codes.A.scalar_type(), at::kChar);
  EXPECT_EQ(codes.B.sizes(), b.sizes());
  EXPECT_EQ(codes.A_scale.sizes(), at::IntArrayRef({5, 1}));
  EXPECT_EQ(codes.B_scale.sizes(), at::IntArrayRef({1, 5}));
  // Scales of bfloat16 cut the largest value by a part of a step.
  EXPECT_LE(((codes.dequantized_A() - a).abs() / codes.A_scale).max().item<double>(), 0.501);
  EXPECT_LE(((codes.dequantized_B() - b).abs() / codes.B_scale).max().item<double>(), 0.501);
  EXPECT_LT(at::max(codes.A_scale / a.abs().amax(1, true)).item<double>(), (1 + 0x1p-8) / 127);
  const LowRankFactors again = store_factors(codes.dequantized_A(), codes.dequantized_B(), at::kChar);
  EXPECT_TRUE(at::equal(again.A, codes.A) && at::equal(again.A_scale, codes.A_scale));
  EXPECT_TRUE(at::equal(again.B, codes.B) && at::equal(again.B_scale, codes.B_scale));
  EXPECT_LT(relative_error(codes.product(), at::mm(codes.dequantized_B(), codes.dequantized_A())), 1e-6);
  EXPECT_LT(relative_error(codes.product(), at::mm(b, a)), 0.02);
  const LowRankFactors cast = store_factors(a, b, at::kBFloat16);
  EXPECT_TRUE(at::equal(cast.A, a.to(at::kBFloat16)) && at::equal(cast.B, b.to(at::kBFloat16)));
  EXPECT_FALSE(cast.A_scale.defined() || cast.B_scale.defined());
}

TEST(ReconstructError, RefusesWhatDoesNotFit) {
  const Tensor error = rounding_error(6, 8);
  expect_error([&] { reconstruct_error(error, at::ones({6}), 2); }, {"[6]", "[6, 8]"});
  expect_error([&] { reconstruct_error(error, at::ones({8, 6}), 2); }, {"[8, 6]", "[6, 8]"});
  expect_error([&] { reconstruct_error(error, {}, 0); }, {"rank is 0"});
  expect_error([&] { reconstruct_error(error.flatten(), {}, 2); }, {"[48]"});
  const Tensor wrong = at::full({8}, std::numeric_limits<double>::quiet_NaN());
  expect_error([&] { reconstruct_error(error, wrong, 2); }, {"not finite"});
}

}  // namespace
}  // namespace baseq
