#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/optim/adam.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "../tiny_model.h"
#include "baseq/quant/low_rank.h"

namespace baseq {
namespace {

using test::expect_error;
using test::random_normal;

constexpr int64_t kRows = 40, kColumns = 64;

/// Second moments of inputs whose channels share a few directions.
Tensor moments_of(int64_t tokens, uint64_t seed) {
  const Tensor mixing = random_normal({kColumns, kColumns}, 1) * at::logspace(0, -1, kColumns).unsqueeze(1);
  const Tensor x = at::mm(random_normal({tokens, kColumns}, seed), mixing);
  return at::mm(x.t(), x) / tokens;
}

Tensor weight_of(uint64_t seed = 7) {
  return random_normal({kRows, kColumns}, seed, at::kFloat) / std::sqrt(double(kColumns));
}

Tensor stored_weight(const FbquantResult& result) { return result.weight.dequantized() + result.lora.product(); }

double output_loss(const Tensor& error, const Tensor& moments) {
  const Tensor e = error.to(at::kDouble);
  return (at::mm(e, moments) * e).sum().item<double>();
}

double relative_loss(const Tensor& got, const Tensor& weight, const Tensor& moments) {
  return output_loss(weight - got, moments) / output_loss(weight, moments);
}

const QuantSpec kGrid{.num_bits = 3, .strategy = Strategy::kGroup, .group_size = 16};

TEST(Fbquant, StraightThroughRoundingWouldCancelTheGradient) {
  const Tensor weight = weight_of(), moments = moments_of(500, 2).to(at::kFloat);
  const Tensor b = (0.05 * random_normal({kRows, 4}, 3, at::kFloat)).requires_grad_();
  const Tensor a = (0.05 * random_normal({4, kColumns}, 4, at::kFloat)).requires_grad_();
  QParams qparams = compute_qparams((weight - at::mm(b, a)).detach(), kGrid);
  qparams.scale = qparams.scale * 1.2;  // nothing is clipped: the straight-through gradient is one everywhere
  const auto gradient_of_b = [&](bool detached) {
    b.mutable_grad() = Tensor();
    const Tensor shift = at::mm(b, a);
    const Tensor rounded = fake_quantize(weight - shift, qparams, kGrid);
    const Tensor error = weight - ((detached ? rounded.detach() : rounded) + shift);
    (at::mm(error, moments) * error).sum().backward();
    return b.grad().clone();
  };
  const Tensor error = weight - (fake_quantize(weight - at::mm(b, a), qparams, kGrid) + at::mm(b, a)).detach();
  const Tensor expected = -2 * at::mm(at::mm(error, moments), a.t().detach());
  EXPECT_LT(gradient_of_b(false).abs().max().item<double>(), 1e-5 * expected.abs().max().item<double>());
  EXPECT_LT(test::relative_error(gradient_of_b(true), expected.detach()), 1e-5);
}

TEST(Fbquant, ZeroStartIsRoundToNearest) {
  const Tensor weight = weight_of(), moments = moments_of(500, 2);
  const FbquantResult result =
      fbquant(weight, moments, kGrid, {.start = FbquantOptions::Start::kZero, .rank = 4, .steps = 0});
  const QuantizedWeight nearest = round_to_nearest(weight, kGrid);
  EXPECT_TRUE(at::equal(result.weight.codes, nearest.codes));
  EXPECT_TRUE(at::equal(stored_weight(result), nearest.dequantized()));
  EXPECT_NEAR(result.loss_before, relative_loss(nearest.dequantized(), weight, moments), 1e-6 * result.loss_before);
}

TEST(Fbquant, GetsBetterAndReportsWhatIsStored) {
  const Tensor weight = weight_of(), moments = moments_of(500, 2);
  for (const auto start : {FbquantOptions::Start::kQera, FbquantOptions::Start::kZero, FbquantOptions::Start::kSvd}) {
    for (const at::ScalarType dtype : {at::kBFloat16, at::kFloat, at::kChar}) {
      const FbquantResult result =
          fbquant(weight, moments, kGrid, {.start = start, .rank = 4, .steps = 60, .dtype = dtype});
      EXPECT_EQ(result.lora.A.sizes(), at::IntArrayRef({4, kColumns}));
      EXPECT_EQ(result.lora.B.sizes(), at::IntArrayRef({kRows, 4}));
      EXPECT_EQ(result.lora.A.scalar_type(), dtype);
      EXPECT_EQ(result.lora.B.scalar_type(), dtype);
      EXPECT_LT(result.relative_error, 0.9 * result.loss_before);
      EXPECT_NEAR(relative_loss(stored_weight(result), weight, moments), result.relative_error,
                  1e-4 * result.relative_error);
    }
  }
}

TEST(Fbquant, IsNeverWorseThanItsStart) {
  const Tensor weight = weight_of(), moments = moments_of(500, 2);
  const FbquantResult wild = fbquant(weight, moments, kGrid, {.rank = 4, .steps = 20, .learning_rate = 10});
  EXPECT_LE(wild.relative_error, wild.loss_before);
  const FbquantResult same = fbquant(weight, moments, kGrid, {.rank = 4, .steps = 20, .learning_rate = 0});
  EXPECT_EQ(same.relative_error, same.loss_before);
}

TEST(Fbquant, StaysWithinHalfAStepOfTheWeight) {
  for (const int64_t bits : {2, 3, 4}) {
    for (const bool symmetric : {true, false}) {
      QuantSpec spec = kGrid;
      spec.num_bits = bits;
      spec.symmetric = symmetric;
      const Tensor weight = weight_of();
      // Nine tokens: a correction that is added after rounding may do as it likes in 55 of 64 directions.
      const FbquantResult result = fbquant(weight, moments_of(9, 2), spec, {.rank = 8, .steps = 60});
      const Tensor steps =
          group_view(weight - stored_weight(result), spec).abs() / result.weight.qparams.scale.unsqueeze(-1);
      EXPECT_LE(steps.max().item<double>(), 0.5 + 1e-4) << bits << symmetric;
      EXPECT_GT(steps.max().item<double>(), 0.45);
      // Scales of bfloat16 may cut the range by their rounding and no more.
      spec.scale_dtype = at::kBFloat16;
      for (const at::ScalarType dtype : {at::kBFloat16, at::kChar}) {
        EXPECT_NO_THROW(fbquant(weight, moments_of(9, 2), spec, {.rank = 8, .steps = 60, .dtype = dtype}));
      }
    }
  }
}

TEST(Fbquant, ClippingLowersTheErrorAndIsHalfAStepOffWithinTheGrid) {
  // A few large weights: a grid that covers them is coarse for the others.
  const Tensor weight = weight_of() * (1 + 3 * random_normal({kRows, kColumns}, 11, at::kFloat).gt(2));
  const Tensor moments = moments_of(500, 2), others = moments_of(4000, 5);
  const FbquantResult covering = fbquant(weight, moments, kGrid, {.rank = 4});
  const FbquantResult clipped = fbquant(weight, moments, kGrid, {.rank = 4, .mse_clip = true});
  EXPECT_FALSE(covering.clip.defined());
  EXPECT_LT(clipped.relative_error, 0.95 * covering.relative_error);
  EXPECT_LE(clipped.relative_error, clipped.loss_before);
  EXPECT_NEAR(clipped.relative_error, relative_loss(stored_weight(clipped), weight, moments), 1e-6);
  // Beside the correction of QERA-exact of the same clipped rounding, also on inputs that were not seen.
  const Tensor rounded = round_to_nearest(weight, kGrid, /*mse_clip=*/true).dequantized();
  const LowRankCorrection correction = reconstruct_error(weight - rounded, moments, 4);
  const Tensor corrected = rounded + at::mm(correction.B, correction.A).to(at::kFloat);
  EXPECT_LT(clipped.relative_error, relative_loss(corrected, weight, moments));
  EXPECT_LT(relative_loss(stored_weight(clipped), weight, others), relative_loss(corrected, weight, others));
  const Tensor steps =
      group_view(weight - stored_weight(clipped), kGrid).abs() / clipped.weight.qparams.scale.unsqueeze(-1);
  const Tensor codes = group_view(clipped.weight.codes, kGrid);
  const Tensor inside = codes.gt(-4).logical_and(codes.lt(3));
  EXPECT_LE(steps.masked_select(inside).max().item<double>(), 0.5 + 1e-3);
  EXPECT_GT(steps.max().item<double>(), 0.6);
}

/// Q(W) + B A with the same Adam, steps and start.
Tensor trained_behind_rounding(const Tensor& weight, const Tensor& moments, int64_t rank, int64_t steps) {
  const Tensor rounded = round_to_nearest(weight, kGrid).dequantized();
  Tensor a = random_normal({rank, kColumns}, 9, at::kFloat) / std::sqrt(double(kColumns));
  Tensor b = at::zeros({kRows, rank});
  const Tensor h = moments.to(at::kFloat);
  const double rate = 0.1 / std::sqrt(double(kColumns));
  torch::optim::Adam optimizer(std::vector<Tensor>{a, b}, torch::optim::AdamOptions(rate).eps(1e-15));
  for (int64_t step = 0; step < steps; ++step) {
    const Tensor gradient = -2 * at::mm(weight - rounded - at::mm(b, a), h);
    a.mutable_grad() = at::mm(b.t(), gradient);
    b.mutable_grad() = at::mm(gradient, a.t());
    optimizer.param_groups()[0].options().set_lr(rate * 0.5 * (1 + std::cos(M_PI * double(step) / double(steps))));
    optimizer.step();
  }
  return rounded + at::mm(b, a);
}

TEST(Fbquant, OverfitsFewTokensLessThanACorrectionBehindTheRounding) {
  const Tensor few = moments_of(32, 2), others = moments_of(4000, 5);
  double gap = 0, gap_behind = 0;
  for (const uint64_t seed : {7, 8, 9}) {
    const Tensor weight = weight_of(seed);
    const Tensor learned = stored_weight(fbquant(
        weight, few, kGrid, {.start = FbquantOptions::Start::kZero, .rank = 8, .steps = 300, .dtype = at::kFloat}));
    const Tensor behind = trained_behind_rounding(weight, few, 8, 300);
    gap += relative_loss(learned, weight, others) - relative_loss(learned, weight, few);
    gap_behind += relative_loss(behind, weight, others) - relative_loss(behind, weight, few);
  }
  EXPECT_GT(gap_behind, 0);
  EXPECT_LT(gap, 0.85 * gap_behind);
}

TEST(Fbquant, WhatIsLearnedIsWhatIsStored) {
  const Tensor weight = weight_of();
  const Tensor a = (0.1 * random_normal({4, kColumns}, 3, at::kFloat)).requires_grad_();
  const Tensor b = (0.1 * random_normal({kRows, 4}, 4, at::kFloat)).requires_grad_();
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kChar}) {
    const LowRankFactors lora = store_factors(a.detach(), b.detach(), dtype);
    const QuantizedWeight rounded = round_beside(weight, lora, kGrid);
    const Tensor learned = feedback_weight(weight, a, b, kGrid, dtype);
    EXPECT_LT(test::relative_error(learned.detach(), rounded.dequantized() + lora.product()), 1e-6);
    const Tensor direction = random_normal(weight.sizes(), 5, at::kFloat);
    const auto gradients = torch::autograd::grad({(learned * direction).sum()}, {a, b});
    EXPECT_LT(test::relative_error(gradients[0], at::mm(lora.dequantized_B().t(), direction)), 1e-5);
    EXPECT_LT(test::relative_error(gradients[1], at::mm(direction, lora.dequantized_A().t())), 1e-5);
  }
}

TEST(Fbquant, ACorrectionThatIsAddedBehindTheRoundingHasNoBound) {
  // The same factors beside Q(W).
  const Tensor weight = weight_of();
  const FbquantResult result = fbquant(weight, moments_of(9, 2), kGrid, {.rank = 8, .steps = 60});
  const QuantizedWeight nearest = round_to_nearest(weight, kGrid);
  const Tensor error = weight - (nearest.dequantized() + result.lora.product());
  EXPECT_GT((group_view(error, kGrid).abs() / nearest.qparams.scale.unsqueeze(-1)).max().item<double>(), 0.6);
}

TEST(Fbquant, IsRepeatable) {
  const Tensor weight = weight_of(), moments = moments_of(500, 2);
  const FbquantOptions options{.start = FbquantOptions::Start::kZero, .rank = 4, .steps = 5, .seed = 3};
  const FbquantResult first = fbquant(weight, moments, kGrid, options),
                      second = fbquant(weight, moments, kGrid, options);
  EXPECT_TRUE(at::equal(first.lora.A, second.lora.A) && at::equal(first.lora.B, second.lora.B));
  EXPECT_TRUE(at::equal(first.weight.codes, second.weight.codes));
}

TEST(Fbquant, AWeightOfZerosStaysZero) {
  const FbquantResult result =
      fbquant(at::zeros({kRows, kColumns}), moments_of(500, 2), kGrid, {.rank = 4, .steps = 3});
  EXPECT_EQ(stored_weight(result).abs().max().item<double>(), 0);
}

/// Half the distance from `scale` to its neighbours in float16, with eleven bits down to 2^-14 and fewer below.
Tensor float16_rounding(const Tensor& scale) {
  const Tensor exponent = scale.log2().floor().clamp_min(-14);
  return (exponent - 11).exp2();
}

TEST(Fbquant, TheBoundCountsWhatFloat16ScalesAreRoundedBy) {
  for (const int64_t bits : {3, 4}) {
    double largest = 0;
    for (const double size : {1.0, 2e-4, 1e-4, 5e-5, 1e-5}) {
      for (const bool symmetric : {true, false}) {
        QuantSpec spec = kGrid;
        spec.num_bits = bits;
        spec.symmetric = symmetric;
        spec.scale_dtype = at::kHalf;
        const Tensor weight = size * random_normal({400, kColumns}, 11, at::kFloat).tanh();
        const LowRankFactors lora =
            store_factors(std::sqrt(size) * random_normal({4, kColumns}, 12, at::kFloat),
                          0.1 * std::sqrt(size) * random_normal({400, 4}, 13, at::kFloat), at::kFloat);
        const QuantizedWeight rounded = round_beside(weight, lora, spec);
        const Tensor scale = rounded.qparams.scale.to(at::kDouble);
        const Tensor error = group_view(weight - (rounded.dequantized() + lora.product()), spec).abs().to(at::kDouble);
        const Tensor steps = error.amax(-1) / scale;
        const Tensor bound = 0.5 + std::ldexp(1, int(bits)) * float16_rounding(scale) / scale;
        EXPECT_TRUE((steps <= bound + 1e-3).all().item<bool>()) << bits << " bits, " << size << ", " << symmetric;
        largest = std::max(largest, steps.max().item<double>());
      }
    }
    // What float16 rounds of a scale of normal size would not explain it.
    EXPECT_GT(largest, 0.5 + std::ldexp(1, int(bits) - 11) + 1e-3);
  }
}

TEST(Fbquant, CorrectionsThatWentAstrayAreRoundedAllTheSame) {
  const Tensor weight = weight_of();
  const LowRankFactors lora = store_factors(1e4 * random_normal({4, kColumns}, 3, at::kFloat),
                                            1e4 * random_normal({kRows, 4}, 4, at::kFloat), at::kFloat);
  EXPECT_NO_THROW(round_beside(weight, lora, kGrid));
}

TEST(Fbquant, FactorsOfAnotherShapeAreRefused) {
  const Tensor weight = weight_of(), A = at::zeros({3, 64}), B = at::zeros({40, 3});
  const auto rounded = [&](const Tensor& a, const Tensor& b) { round_beside(weight, {.A = a, .B = b}, kGrid); };
  const auto fed_back = [&](const Tensor& a, const Tensor& b) { feedback_weight(weight, a, b, kGrid, at::kFloat); };
  expect_error([&] { rounded(A.t(), B); }, {"round_beside", "[64, 3]", "[40, 64]"});
  expect_error([&] { rounded(A, B.narrow(0, 0, 1)); }, {"round_beside", "[1, 3]"});
  expect_error([&] { fed_back(A.narrow(0, 0, 1), B); }, {"feedback_weight", "[1, 64]"});
  expect_error([&] { fed_back(A.narrow(1, 0, 1), B); }, {"feedback_weight", "[3, 1]"});
}

TEST(Fbquant, RefusesWhatDoesNotFit) {
  const Tensor weight = weight_of(), moments = moments_of(500, 2);
  expect_error([&] { fbquant(weight, moments.slice(0, 1), kGrid); }, {"[63, 64]", "[40, 64]"});
  expect_error([&] { fbquant(weight, moments, kGrid, {.rank = 0}); }, {"rank is 0"});
  expect_error([&] { fbquant(weight, moments, kGrid, {.steps = -1}); }, {"steps -1"});
  const Tensor wrong = at::full_like(moments, std::numeric_limits<double>::quiet_NaN());
  expect_error([&] { fbquant(weight, wrong, kGrid); }, {"not finite"});
  expect_error([&] { fbquant(weight, moments, {.dynamic = true}); }, {"fbquant", "static"});
}

}  // namespace
}  // namespace baseq
