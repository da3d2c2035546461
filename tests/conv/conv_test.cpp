#include "baseq/conv/conv.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <functional>
#include <random>
#include <tuple>
#include <utility>

namespace baseq {
namespace {

/// The convolution in float64, of small integers exact.
Tensor direct(const Tensor& x, const Tensor& weight, const Tensor& bias, const Padding& p) {
  const Tensor padded = at::constant_pad_nd(x.to(at::kDouble), {p.left, p.right, p.top, p.bottom});
  return at::conv2d(padded, weight.to(at::kDouble), bias.defined() ? bias.to(at::kDouble) : bias);
}

ConvAlgorithm random_axis(const std::function<int64_t(int64_t, int64_t)>& draw) {
  constexpr int64_t kAxes[][3] = {{4, 4, 3}, {6, 6, 3}, {6, 7, 3}, {6, 6, 5}, {6, 4, 7}, {3, 3, 3}, {6, 4, 4}};
  const auto& [points, outputs, taps] = kAxes[draw(0, 6)];
  return sfc_algorithm(points, outputs, taps);
}

TEST(Conv2dSfc, IntegersAreBitIdenticalToTheDirectConvolutionOverRandomShapes) {
  std::mt19937 engine(3);
  const auto draw = [&](int64_t low, int64_t high) { return low + static_cast<int64_t>(engine() % (high - low + 1)); };
  at::manual_seed(3);
  for (int trial = 0; trial < 60; ++trial) {
    const ConvAlgorithm axis = random_axis(draw);
    const ConvAlgorithm other = trial % 3 == 0 ? random_axis(draw) : axis;
    const ConvForm form = trial % 2 == 0 && axis.points == other.points ? ConvForm::kSymbolic : ConvForm::kFolded;
    const ConvAlgorithm2d algorithm = tile_algorithm(axis, other, form);
    const Padding padding{draw(0, 4), draw(0, 4), draw(0, 4), draw(0, 4)};
    const int64_t in = draw(1, 70), out = draw(1, 40), batch = draw(1, 3);
    const Tensor x = at::randint(-128, 128, {batch, in, draw(axis.taps, 23), draw(other.taps, 23)}, at::kChar);
    const Tensor weight = at::randint(-128, 128, {out, in, axis.taps, other.taps}, at::kChar);
    const Tensor bias = trial % 4 == 0 ? at::randint(-1000, 1000, {out}, at::kInt) : Tensor();
    const Tensor y = conv2d_sfc(x, weight, bias, algorithm, padding);
    ASSERT_EQ(y.scalar_type(), at::kInt);
    ASSERT_TRUE(at::equal(y.to(at::kDouble), direct(x, weight, bias, padding)))
        << "x " << x.sizes() << ", weight " << weight.sizes() << ", " << axis.points << " points";
  }
}

TEST(Conv2dSfc, LargestIntegersDoNotOverflow) {
  for (const ConvForm form : {ConvForm::kFolded, ConvForm::kSymbolic}) {
    for (const int64_t in : {16, 700}) {  // sums of int32, sums of int64
      const Tensor x = at::full({1, in, 9, 9}, -128, at::kChar);
      const Tensor weight = at::full({2, in, 3, 3}, -128, at::kChar);
      weight.select(0, 1).fill_(127);
      const Tensor y = conv2d_sfc(x, weight, {}, tile_algorithm(sfc_algorithm(6, 7, 3), form), Padding::all(1));
      EXPECT_TRUE(at::equal(y.to(at::kDouble), direct(x, weight, {}, Padding::all(1)))) << in << " channels";
    }
  }
}

TEST(Conv2dSfc, RealNumbersKeepThePrecisionOfTheirType) {
  at::manual_seed(4);
  const Tensor x = at::randn({2, 40, 30, 26}, at::kDouble), weight = at::randn({37, 40, 3, 3}, at::kDouble);
  const Tensor bias = at::randn({37}, at::kDouble);
  const Tensor expected = direct(x, weight, bias, Padding::all(1));
  const double size = expected.abs().max().item<double>();
  const std::pair<ConvAlgorithm2d, double> cases[] = {
      {tile_algorithm(sfc_algorithm(4, 4, 3)), 1e-6},
      {tile_algorithm(sfc_algorithm(6, 7, 3)), 1e-6},
      {tile_algorithm(sfc_algorithm(6, 6, 3), ConvForm::kSymbolic), 1e-6},
      {tile_algorithm(direct_algorithm(3), sfc_algorithm(4, 4, 3)), 1e-6},
      {tile_algorithm(winograd_algorithm(2, 3)), 1e-6},
      {tile_algorithm(winograd_algorithm(4, 3)), 1e-5},
  };
  for (const auto& [algorithm, tolerance] : cases) {
    const Tensor y = conv2d_sfc(x, weight, bias, algorithm, Padding::all(1));
    EXPECT_TRUE(y.is_contiguous(at::MemoryFormat::ChannelsLast));
    EXPECT_LT((y - expected).abs().max().item<double>(), 1e-8 * tolerance * size);
    const Tensor z =
        conv2d_sfc(x.to(at::kFloat), weight.to(at::kFloat), bias.to(at::kFloat), algorithm, Padding::all(1));
    EXPECT_LT((z - expected).abs().max().item<double>(), tolerance * size) << algorithm.num_products();
  }
}

TEST(Conv2dSfc, AnImageLargerThanABlockOfTilesIsWhole) {
  at::manual_seed(5);
  const Tensor x = at::randint(-128, 128, {2, 64, 90, 75}, at::kChar);
  const Tensor weight = at::randint(-128, 128, {64, 64, 3, 3}, at::kChar);
  const Tensor y = conv2d_sfc(x, weight, {}, tile_algorithm(sfc_algorithm(4, 4, 3)), Padding::all(1));
  EXPECT_TRUE(at::equal(y.to(at::kDouble), direct(x, weight, {}, Padding::all(1))));
}

TEST(Conv2dSfc, MemoryFormatOfTheInputDoesNotMatter) {
  at::manual_seed(6);
  const Tensor x = at::randn({2, 5, 14, 12}), weight = at::randn({7, 5, 3, 3});
  const ConvAlgorithm2d algorithm = tile_algorithm(sfc_algorithm(6, 6, 3));
  const Tensor y = conv2d_sfc(x, weight, {}, algorithm);
  EXPECT_TRUE(at::equal(y, conv2d_sfc(x.contiguous(at::MemoryFormat::ChannelsLast), weight, {}, algorithm)));
  EXPECT_TRUE(at::equal(y, conv2d_sfc(x.transpose(2, 3).contiguous().transpose(2, 3), weight, {}, algorithm)));
}

TEST(Conv1dSfc, CausalAndCentredConvolutionsOfAudioAreExact) {
  at::manual_seed(7);
  for (const auto& [points, outputs, taps] :
       {std::tuple<int64_t, int64_t, int64_t>{6, 6, 3}, {6, 6, 5}, {6, 4, 7}, {4, 4, 3}}) {
    for (const Padding& padding :
         {Padding{.left = taps - 1}, Padding{.left = taps / 2, .right = taps / 2}, Padding{}}) {
      const Tensor x = at::randint(-128, 128, {2, 33, 101}, at::kChar);
      const Tensor weight = at::randint(-128, 128, {35, 33, taps}, at::kChar);
      const Tensor y = conv1d_sfc(x, weight, {}, sfc_algorithm(points, outputs, taps), padding);
      const Tensor padded = at::constant_pad_nd(x.to(at::kDouble), {padding.left, padding.right});
      EXPECT_TRUE(at::equal(y.to(at::kDouble), at::conv1d(padded, weight.to(at::kDouble))));
    }
  }
}

TEST(Conv2dSfc, RefusesWhatDoesNotFit) {
  const ConvAlgorithm2d algorithm = tile_algorithm(sfc_algorithm(6, 6, 3));
  const Tensor x = at::randn({1, 4, 8, 8}), weight = at::randn({5, 4, 3, 3});
  const auto run = [&](const Tensor& a, const Tensor& b, const Tensor& c, const Padding& p = {}) {
    return conv2d_sfc(a, b, c, algorithm, p);
  };
  EXPECT_NO_THROW(run(x, weight, {}));
  EXPECT_THROW(run(x[0], weight, {}), c10::Error);
  EXPECT_THROW(run(x, at::randn({5, 3, 3, 3}), {}), c10::Error);
  EXPECT_THROW(run(x, at::randn({5, 4, 3, 5}), {}), c10::Error);
  EXPECT_THROW(run(x, weight.to(at::kDouble), {}), c10::Error);
  EXPECT_THROW(run(x.to(at::kHalf), weight.to(at::kHalf), {}), c10::Error);
  EXPECT_THROW(run(x, weight, at::zeros({4})), c10::Error);
  EXPECT_THROW(run(x, weight, at::zeros({5}, at::kDouble)), c10::Error);
  EXPECT_THROW(run(at::randn({1, 4, 2, 8}), weight, {}), c10::Error);
  EXPECT_THROW(run(at::randn({0, 4, 8, 8}), weight, {}), c10::Error);
  EXPECT_THROW(run(x, weight, {}, {.top = -1}), c10::Error);
  // 24 G of F(4,3) does not fit into int16.
  EXPECT_THROW(conv2d_sfc(x.to(at::kChar), weight.to(at::kChar), {}, tile_algorithm(winograd_algorithm(4, 3))),
               c10::Error);
  EXPECT_THROW(conv1d_sfc(x[0], weight[0], {}, sfc_algorithm(6, 6, 3), {.top = 1}), c10::Error);
}

}  // namespace
}  // namespace baseq
