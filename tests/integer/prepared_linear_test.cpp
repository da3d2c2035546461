#include "integer/prepared_linear.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <random>
#include <utility>
#include <vector>

#include "baseq/quant/quantize.h"

namespace baseq {
namespace {

struct Case {
  int64_t out_features, in_features, rank;
  QuantSpec spec;
  int64_t activation_bits = 8;
  bool quantized_inputs = true;  ///< false: fixed_point_rows
  bool symmetric_inputs = false;
  bool bias = false;
  at::ScalarType factor_dtype = at::kBFloat16;
};

std::string name(const Case& c) {
  return c10::str(c.out_features, "x", c.in_features, " rank ", c.rank, " ", c.factor_dtype, ", ", c.spec.num_bits,
                  " bits, group ", c.spec.group_size, c.spec.symmetric ? ", symmetric" : ", asymmetric", " ",
                  c.spec.scale_dtype, ", activations ", c.activation_bits, c.quantized_inputs ? "" : " fixed point",
                  c.symmetric_inputs ? " symmetric" : "");
}

/// A random linear and its parts.
struct Linear {
  QuantizedWeight weight;
  LowRankFactors low_rank;
  Tensor bias;

  explicit Linear(const Case& c) {
    const int64_t bits = c.spec.num_bits, low = -(1 << (bits - 1)), high = 1 << (bits - 1);
    const int64_t groups = c.spec.strategy == Strategy::kGroup ? c.in_features / c.spec.group_size : 1;
    const int64_t rows = c.spec.strategy == Strategy::kTensor ? 1 : c.out_features;
    weight.spec = c.spec;
    weight.codes = at::randint(low, high, {c.out_features, c.in_features}, at::kChar);
    weight.qparams.scale = (at::rand({rows, groups}) * 0.1 + 0.01).to(c.spec.scale_dtype).to(at::kFloat);
    if (!c.spec.symmetric) weight.qparams.zero_point = at::randint(low, high, {rows, groups}, at::kFloat);
    if (c.rank > 0) {
      low_rank =
          store_factors(at::randn({c.rank, c.in_features}), at::randn({c.out_features, c.rank}) * 0.1, c.factor_dtype);
    }
    if (c.bias) bias = at::randn({c.out_features});
  }
  PreparedLinear prepared() const { return PreparedLinear(weight, low_rank, bias); }
};

Activations activations_of(const Case& c, const Tensor& x, const ColumnGroups& columns) {
  if (!c.quantized_inputs) return fixed_point_rows(x, columns, c.activation_bits);
  const QuantSpec spec{
      .num_bits = c.activation_bits, .symmetric = c.symmetric_inputs, .strategy = Strategy::kToken, .dynamic = true};
  return quantize_rows(x, columns, spec, 0.9);
}

Case random_case(std::mt19937& random) {
  const auto pick = [&](std::initializer_list<int64_t> values) { return values.begin()[random() % values.size()]; };
  const int64_t group_size = pick({0, 8, 24, 32, 40, 64, 128});
  const bool quantized = random() % 3 != 0;
  return {.out_features = static_cast<int64_t>(1 + random() % 70),
          .in_features = group_size == 0 ? static_cast<int64_t>(1 + random() % 500)
                                         : group_size * static_cast<int64_t>(1 + random() % 6),
          .rank = pick({0, 0, 1, 16, 33}),
          .spec = {.num_bits = static_cast<int64_t>(2 + random() % 7),
                   .symmetric = random() % 2 == 0,
                   .strategy = group_size > 0      ? Strategy::kGroup
                               : random() % 4 == 0 ? Strategy::kTensor
                                                   : Strategy::kChannel,
                   .group_size = group_size,
                   .scale_dtype = std::array{at::kFloat, at::kBFloat16, at::kHalf}[random() % 3]},
          .activation_bits = quantized ? pick({4, 8}) : pick({8, 15}),
          .quantized_inputs = quantized,
          .symmetric_inputs = random() % 2 == 0,
          .bias = random() % 2 == 0,
          .factor_dtype = std::array{at::kFloat, at::kHalf, at::kBFloat16, at::kChar}[random() % 4]};
}

TEST(PreparedLinear, IsTheProductWithTheDequantizedWeightToFourUlpOfWhatIsSummed) {
  at::manual_seed(1);
  std::mt19937 random(2);
  for (int i = 0; i < 400; ++i) {
    const Case c = random_case(random);
    const Linear linear(c);
    const PreparedLinear prepared = linear.prepared();
    const Activations x =
        activations_of(c, at::randn({static_cast<int64_t>(1 + random() % 9), c.in_features}), prepared.columns());
    const Tensor values = x.dequantized().to(at::kDouble), weight = linear.weight.dequantized().to(at::kDouble);
    const Tensor base = x.base.defined() ? x.base.to(at::kDouble).unsqueeze(1) : at::zeros({x.rows(), 1}, at::kDouble);
    Tensor expected = at::linear(values, weight);
    Tensor magnitude = at::linear((values - base).abs() + base.abs(), weight.abs());
    if (c.rank > 0) {
      const Tensor down = linear.low_rank.dequantized_A().to(at::kDouble);
      const Tensor up = linear.low_rank.dequantized_B().to(at::kDouble);
      expected += at::linear(at::linear(values, down), up);
      magnitude += at::linear(at::linear(values.abs(), down.abs()), up.abs());
    }
    if (c.bias) {
      expected += linear.bias;
      magnitude += linear.bias.abs();
    }
    const Tensor ulp = magnitude.to(at::kFloat);
    const Tensor step = (at::nextafter(ulp, at::full_like(ulp, INFINITY)) - ulp).to(at::kDouble);
    const Tensor error = (prepared.forward(x).to(at::kDouble) - expected).abs() / step;
    ASSERT_LE(error.max().item<double>(), 4) << name(c);
  }
}

TEST(PreparedLinear, IsTheSameBitsForAnyInstructionSetThreadsAndRows) {
  at::manual_seed(3);
  std::mt19937 random(4);
  const int threads = at::get_num_threads();
  for (int i = 0; i < 120; ++i) {
    const Case c = random_case(random);
    const PreparedLinear prepared = Linear(c).prepared();
    const int64_t rows = 1 + static_cast<int64_t>(random() % 15);
    const Tensor x = at::randn({rows, c.in_features});
    const Activations all = activations_of(c, x, prepared.columns());
    const Tensor expected = prepared.forward(all, kScalarKernels);
    for (int64_t k = 0; k < kNumIntegerKernels; ++k) {
      if (!kIntegerKernels[k]->supported()) continue;
      for (const int count : {1, 2, 3}) {
        at::set_num_threads(count);
        ASSERT_TRUE(prepared.forward(all, *kIntegerKernels[k]).equal(expected)) << name(c) << ", " << count;
      }
      for (const int64_t step : {1, 4}) {
        for (int64_t row = 0; row < rows; row += step) {
          const int64_t end = std::min(rows, row + step);
          const Activations part = activations_of(c, x.slice(0, row, end), prepared.columns());
          ASSERT_TRUE(prepared.forward(part, *kIntegerKernels[k]).equal(expected.slice(0, row, end))) << name(c);
        }
      }
    }
  }
  at::set_num_threads(threads);
}

TEST(PreparedLinear, ManyThreadsComputeALargeLinearAlike) {
  at::manual_seed(5);
  const int threads = at::get_num_threads();
  const Case c{.out_features = 700,
               .in_features = 512,
               .rank = 16,
               .spec = {.num_bits = 4, .strategy = Strategy::kGroup, .group_size = 64, .scale_dtype = at::kBFloat16}};
  const PreparedLinear prepared = Linear(c).prepared();
  const Activations x = fixed_point_rows(at::randn({40, 512}), prepared.columns(), 15);
  at::set_num_threads(1);
  const Tensor expected = prepared.forward(x);
  for (const int count : {2, 3}) {
    at::set_num_threads(count);
    EXPECT_TRUE(prepared.forward(x).equal(expected));
  }
  at::set_num_threads(threads);
}

TEST(PreparedLinear, RoundsToTheCodesOfFakeQuantization) {
  at::manual_seed(6);
  const Tensor x = at::randn({17, 96}) * 3 + 0.5;
  for (const int64_t bits : {2, 4, 7, 8}) {
    for (const bool symmetric : {true, false}) {
      const QuantSpec spec{.num_bits = bits, .symmetric = symmetric, .strategy = Strategy::kToken, .dynamic = true};
      const Activations codes = quantize_rows(x, {96, 96}, spec, 0.8);
      const Tensor expected = fake_quantize_dynamic(x, spec, at::full({1, 1}, 0.8), {}, {}, false);
      EXPECT_LT((codes.dequantized() - expected).abs().max().item<double>(), 1e-5) << bits << symmetric;
    }
  }
}

TEST(PreparedLinear, FifteenBitsKeepTheInputs) {
  at::manual_seed(7);
  Tensor x = at::randn({5, 256});
  x.select(1, 3).mul_(1000);  // only its own group becomes coarse
  const Tensor exact = fixed_point_rows(x, {256, 64}, 15).dequantized();
  const Tensor largest = x.view({5, 4, 64}).abs().amax(-1, true);
  const Tensor error = ((exact - x).view({5, 4, 64}).abs() / largest).max();
  EXPECT_LE(error.item<double>(), 1.01 / 32766);
  EXPECT_EQ(fixed_point_rows(at::zeros({1, 64}), {64, 64}, 15).dequantized().abs().max().item<float>(), 0);
}

TEST(PreparedLinear, ATokenThatIsNotFiniteGivesNanAndLeavesTheOthers) {
  at::manual_seed(8);
  const PreparedLinear prepared = Linear(Case{.out_features = 20, .in_features = 64, .rank = 2}).prepared();
  const Tensor x = at::randn({6, 64});
  const QuantSpec spec{.num_bits = 8, .symmetric = false, .strategy = Strategy::kToken, .dynamic = true};
  const Tensor expected = prepared.forward(quantize_rows(x, prepared.columns(), spec));
  for (const float bad : {NAN, INFINITY}) {
    Tensor with_bad = x.clone();
    with_bad.select(0, 2).select(0, 5).fill_(bad);
    for (const Tensor& y : {prepared.forward(quantize_rows(with_bad, prepared.columns(), spec)),
                            prepared.forward(fixed_point_rows(with_bad, prepared.columns(), 15))}) {
      EXPECT_TRUE(y[2].isnan().all().item<bool>());
      EXPECT_TRUE(y.narrow(0, 3, 3).isfinite().all().item<bool>());
    }
    const Tensor y = prepared.forward(quantize_rows(with_bad, prepared.columns(), spec));
    EXPECT_TRUE(y.narrow(0, 0, 2).equal(expected.narrow(0, 0, 2)));
  }
}

TEST(PreparedLinear, TakesTheBytesOfItsCodesAndScales) {
  const Case c{.out_features = 256, .in_features = 512, .rank = 0, .spec = {.num_bits = 3, .scale_dtype = at::kHalf}};
  const int64_t codes = 256 * 512 * 3 / 8, scales = 256 * 2, sums = 256 * 4;
  EXPECT_LE(Linear(c).prepared().bytes(), codes + scales + sums + 16 * 64);
}

TEST(PreparedLinear, RefusesWhatDoesNotFit) {
  const Case c{.out_features = 8, .in_features = 64, .rank = 0};
  const PreparedLinear prepared = Linear(c).prepared();
  EXPECT_THROW(prepared.forward(fixed_point_rows(at::randn({1, 64}), {64, 32}, 8)), c10::Error);
  EXPECT_THROW(fixed_point_rows(at::randn({1, 64}), {64, 48}, 8), c10::Error);
  EXPECT_THROW(fixed_point_rows(at::randn({1, 64}), {64, 64}, 9), c10::Error);
  Linear linear(c);
  linear.bias = at::randn({9});
  EXPECT_THROW(linear.prepared(), c10::Error);
  linear = Linear(c);
  linear.weight.spec.symmetric = false;
  EXPECT_THROW(linear.prepared(), c10::Error);
  linear.weight.qparams.zero_point = at::full({8, 1}, 0.5);
  EXPECT_THROW(linear.prepared(), c10::Error);
  linear = Linear(c);
  linear.low_rank = store_factors(at::randn({2, 63}), at::randn({8, 2}), at::kFloat);
  EXPECT_THROW(linear.prepared(), c10::Error);
}

TEST(PreparedLinear, TogetherComputesTheBitsOfEachAlone) {
  at::manual_seed(8);
  std::mt19937 random(9);
  for (int i = 0; i < 60; ++i) {
    Case c = random_case(random);
    c.rank = 0;
    std::vector<Linear> linears;
    for (int k = 0; k < 3; ++k) {
      c.out_features = static_cast<int64_t>(1 + random() % 70);
      linears.emplace_back(c);
    }
    const std::array weights{&std::as_const(linears[0].weight), &std::as_const(linears[1].weight),
                             &std::as_const(linears[2].weight)};
    const std::array biases{linears[0].bias, linears[1].bias, linears[2].bias};
    const auto parts = PreparedLinear::together(weights, biases);
    ASSERT_EQ(parts.size(), 3) << name(c);
    const std::shared_ptr<const PreparedLinear>& joint = parts[0]->joint();
    const Activations x =
        activations_of(c, at::randn({static_cast<int64_t>(1 + random() % 40), c.in_features}), joint->columns());
    const Tensor all = joint->forward(x);
    int64_t bytes = 0;
    for (size_t k = 0; k < parts.size(); ++k) {
      ASSERT_EQ(parts[k]->joint(), joint);
      const Tensor expected = linears[k].prepared().forward(x);
      ASSERT_TRUE(parts[k]->forward(x).equal(expected)) << name(c);
      ASSERT_TRUE(all.narrow(1, parts[k]->first_row(), parts[k]->out_features()).equal(expected)) << name(c);
      bytes += parts[k]->bytes();
    }
    EXPECT_EQ(bytes, joint->bytes()) << name(c);
  }
}

TEST(PreparedLinear, TogetherNeedsOneLayout) {
  const auto random_weight = [](int64_t bits, int64_t in_features) {
    return Linear({.out_features = 20, .in_features = in_features, .rank = 0, .spec = {.num_bits = bits}}).weight;
  };
  const QuantizedWeight four = random_weight(4, 64), three = random_weight(3, 64), wide = random_weight(4, 128);
  const auto together = [](const QuantizedWeight& a, const QuantizedWeight& b, const Tensor& bias = {}) {
    return PreparedLinear::together(std::array{&a, &b}, std::array{bias, Tensor()}).size();
  };
  EXPECT_EQ(together(four, four), 2);
  EXPECT_EQ(together(four, three), 0);
  EXPECT_EQ(together(four, wide), 0);
  EXPECT_EQ(together(four, four, at::zeros({20})), 0);
  EXPECT_THROW(PreparedLinear::together(std::array{&four}, std::array{at::zeros({19})}), c10::Error);
}

}  // namespace
}  // namespace baseq
