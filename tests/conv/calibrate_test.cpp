#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <vector>

#include "baseq/conv/quantized_conv.h"

namespace baseq {
namespace {

ConvQuantization four_bits() {
  return {.weights = {.num_bits = 4}, .activations = {.num_bits = 4}, .search = MseSearch{.norm = 2}};
}

/// Images whose channels mix a few smooth ones, so that errors of one channel can be made up for by others.
Tensor correlated(int64_t images, int64_t channels, int64_t size) {
  const Tensor few = at::avg_pool2d(at::randn({images, 4, size + 2, size + 2}), 3, 1) * 3;
  return at::conv2d(few, at::randn({channels, 4, 1, 1})).clamp_min(0);
}

double error_of(const QuantizedConv2d& layer, const Tensor& x, const Tensor& expected) {
  return (IntegerConv2d(layer)(x) - expected).square().mean().item<double>();
}

TEST(DistillConv2d, LearningLowersTheErrorAlsoOnImagesItHasNotSeen) {
  at::manual_seed(1);
  const Tensor mixing = at::randn({12, 4, 1, 1}), weight = at::randn({10, 12, 3, 3}), bias = at::randn({10});
  const auto images = [&](int64_t n) {
    const Tensor few = at::avg_pool2d(at::randn({n, 4, 22, 22}), 3, 1) * 3;
    return at::conv2d(few, mixing).clamp_min(0);
  };
  const Tensor x = images(24), unseen = images(8);
  const ConvAlgorithm2d algorithm = tile_algorithm(sfc_algorithm(6, 6, 3));
  const ConvDistillation options{
      .steps = 150, .batch_size = 8, .weight_learning_rate = 0.02, .scale_learning_rate = 0.02, .seed = 3};
  const Tensor target = at::conv2d(x, weight, bias);
  const DistilledConv2d distilled = distill_conv2d(weight, bias, x, target, algorithm, {}, four_bits(), options);
  EXPECT_LT(distilled.error_after, 0.8 * distilled.error_before);
  EXPECT_NEAR(error_of(distilled.layer, x, target) / distilled.error_after, 1, 1e-5);
  const Tensor expected = at::conv2d(unseen, weight, bias);
  const QuantizedConv2d start = quantize_conv2d(weight, bias, x, algorithm, {}, four_bits());
  EXPECT_NEAR(error_of(start, x, target) / distilled.error_before, 1, 1e-5);
  EXPECT_LT(error_of(distilled.layer, unseen, expected), 0.9 * error_of(start, unseen, expected));
  // The same seed gives the same layer.
  const DistilledConv2d again = distill_conv2d(weight, bias, x, target, algorithm, {}, four_bits(), options);
  EXPECT_TRUE(at::equal(again.layer.weight_codes, distilled.layer.weight_codes));
  EXPECT_TRUE(at::equal(again.layer.input_scale, distilled.layer.input_scale));
}

TEST(DistillConv2d, AStepThatOnlyHarmsIsNotKept) {
  at::manual_seed(2);
  const Tensor x = correlated(4, 6, 14), weight = at::randn({5, 6, 3, 3});
  const DistilledConv2d distilled =
      distill_conv2d(weight, {}, x, at::conv2d(x, weight), tile_algorithm(sfc_algorithm(4, 4, 3)), {}, four_bits(),
                     {.steps = 3, .weight_learning_rate = 100});
  EXPECT_EQ(distilled.error_after, distilled.error_before);
}

TEST(CalibrateLayers, LaterLayersMakeUpForTheErrorsOfEarlierOnes) {
  at::manual_seed(3);
  const auto leaky = [](const Tensor& y) { return at::leaky_relu(y, 0.1); };
  const Tensor x = correlated(16, 8, 20);
  std::vector<ConvLayer> layers;
  for (int i = 0; i < 3; ++i) {
    layers.push_back({.weight = at::randn({8, 8, 3, 3}) * 0.15,
                      .bias = at::randn({8}) * 0.1,
                      .padding = Padding::all(1),
                      .activation = leaky,
                      .algorithm = tile_algorithm(sfc_algorithm(4, 4, 3)),
                      .quantization = four_bits()});
  }
  Tensor expected = x;
  for (const ConvLayer& layer : layers) expected = leaky(at::conv2d(expected, layer.weight, layer.bias, 1, 1));
  const auto error = [&](const std::vector<QuantizedConv2d>& quantized) {
    Tensor y = x;
    for (const QuantizedConv2d& layer : quantized) y = leaky(IntegerConv2d(layer)(y));
    return (y - expected).square().mean().item<double>();
  };
  int heard = 0;
  const double searched = error(calibrate_layers(layers, x, {.steps = 0}, [&](const DistilledConv2d&) { ++heard; }));
  EXPECT_EQ(heard, 3);
  EXPECT_LT(error(calibrate_layers(layers, x, {.steps = 60, .weight_learning_rate = 0.01})), 0.8 * searched);
}

TEST(DistillConv2d, RefusesWhatDoesNotFit) {
  const Tensor x = at::randn({2, 4, 9, 9}), weight = at::randn({5, 4, 3, 3});
  const ConvAlgorithm2d algorithm = tile_algorithm(sfc_algorithm(6, 6, 3));
  EXPECT_THROW(distill_conv2d(weight, {}, x, at::randn({2, 5, 9, 9}), algorithm, {}, four_bits()), c10::Error);
  EXPECT_THROW(distill_conv2d(weight, {}, x, at::conv2d(x, weight), algorithm, {}, four_bits(), {.steps = -1}),
               c10::Error);
}

}  // namespace
}  // namespace baseq
