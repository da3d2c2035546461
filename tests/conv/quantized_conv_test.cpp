#include "baseq/conv/quantized_conv.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <string>

#include "../../src/conv/int8_product.h"

namespace baseq {
namespace {

double sqnr(const Tensor& got, const Tensor& expected) {
  const Tensor error = got.to(at::kDouble) - expected.to(at::kDouble);
  return 10 * std::log10(expected.to(at::kDouble).square().sum().item<double>() / error.square().sum().item<double>());
}

/// Images after a ReLU whose neighbouring pixels correlate by 0.95 along both axes: the model of docs/conv.md.
Tensor images(int64_t batch, int64_t channels, int64_t size) {
  Tensor x = at::randn({batch, channels, size, size}, at::kDouble);
  for (const int64_t axis : {3, 2}) {
    for (int64_t i = 1; i < size; ++i) {
      x.select(axis, i).mul_(std::sqrt(1 - 0.95 * 0.95)).add_(x.select(axis, i - 1), 0.95);
    }
  }
  return x.clamp_min(0).to(at::kFloat);
}

/// The convolution of fake-quantized input (one scale) and weight (one for each output channel).
Tensor direct_quantized(const Tensor& x, const Tensor& weight, int64_t bits) {
  const QuantSpec of_x{.num_bits = bits, .strategy = Strategy::kTensor}, of_weight{.num_bits = bits};
  const Tensor rows = weight.flatten(1);
  return at::conv2d(fake_quantize(x, compute_qparams(x, of_x), of_x),
                    fake_quantize(rows, compute_qparams(rows, of_weight), of_weight).view(weight.sizes()));
}

Tensor by_integers(const Tensor& x, const Tensor& weight, const ConvAlgorithm& axis, const ConvQuantization& q) {
  return IntegerConv2d(quantize_conv2d(weight, {}, x, tile_algorithm(axis), {}, q))(x);
}

ConvQuantization of_bits(int64_t bits, Strategy strategy = Strategy::kChannel) {
  return {.weights = {.num_bits = bits, .strategy = strategy}, .activations = {.num_bits = bits, .strategy = strategy}};
}

TEST(Int8Weights, ProductsAreExactForEveryShapeAndBothWays) {
  at::manual_seed(1);
  for (const bool vnni : {false, true}) {
    if (vnni && !has_vnni()) continue;
    for (const int64_t rows : {1, 5, 6, 7, 8, 11, 12, 13, 19}) {
      for (const int64_t columns : {1, 15, 16, 17, 33, 64, 70, 130}) {
        for (const int64_t depth : {1, 3, 4, 9, 64}) {
          const Tensor a = at::randint(-128, 128, {3, rows, depth}, at::kChar);
          const Tensor b = at::randint(-128, 128, {3, columns, depth}, at::kChar);
          Tensor codes = at::empty({a.numel() + 3}, at::kByte);
          codes.slice(0, 0, a.numel()).copy_(a.to(at::kInt).add(128).flatten());
          const Tensor out = at::full({3, rows, columns}, -1, at::kInt);
          Int8Weights(b, vnni).multiply(codes.const_data_ptr<uint8_t>(), rows, out.mutable_data_ptr<int32_t>());
          ASSERT_TRUE(at::equal(out.to(at::kDouble), a.to(at::kDouble).bmm(b.to(at::kDouble).transpose(1, 2))))
              << rows << " x " << columns << " x " << depth << (vnni ? " by VNNI" : "");
        }
      }
    }
  }
}

TEST(QuantizedConv2d, IntegersGiveWhatFloatingPointGives) {
  at::manual_seed(2);
  const Tensor x = at::randn({2, 35, 17, 22}), weight = at::randn({41, 35, 3, 3}), bias = at::randn({41});
  for (const int64_t bits : {8, 6, 4}) {
    for (const ConvForm form : {ConvForm::kFolded, ConvForm::kSymbolic}) {
      for (const Strategy strategy : {Strategy::kChannel, Strategy::kTensor}) {
        const ConvAlgorithm2d algorithm = tile_algorithm(sfc_algorithm(6, 7, 3), form);
        const ConvQuantization q = of_bits(bits, strategy);
        QuantizedConv2d layer = quantize_conv2d(weight, bias, x, algorithm, Padding::all(1), q);
        // The extremes of a range lie on the middle between two codes; a larger scale moves them away.
        layer.weight_scale = layer.weight_scale * 1.01;
        layer.input_scale = layer.input_scale * 1.01;
        layer.weight_codes =
            quantize(transformed_weight(weight, algorithm), {layer.weight_scale.view({-1, 1}), {}}, {.num_bits = bits});
        const bool one = strategy == Strategy::kTensor;
        const Tensor simulated =
            simulate_conv2d(x, weight, bias, algorithm, Padding::all(1), q,
                            one ? layer.weight_scale.slice(0, 0, 1).slice(1, 0, 1).log() : layer.weight_scale.log(),
                            one ? layer.input_scale.slice(0, 0, 1).log() : layer.input_scale.log());
        // Codes differ where a value falls near the middle between two.
        EXPECT_GT(sqnr(IntegerConv2d(layer)(x), simulated), 55) << bits << " bits";
      }
    }
  }
}

TEST(QuantizedConv2d, ThreadsAndMemoryFormatDoNotMatter) {
  at::manual_seed(3);
  const Tensor x = at::randn({3, 40, 33, 29}), weight = at::randn({24, 40, 3, 3});
  const IntegerConv2d conv(
      quantize_conv2d(weight, {}, x, tile_algorithm(sfc_algorithm(6, 6, 3)), Padding::all(1), of_bits(8)));
  const Tensor y = conv(x);
  const int threads = at::get_num_threads();
  for (const int n : {1, 2, 5}) {
    at::set_num_threads(n);
    EXPECT_TRUE(at::equal(y, conv(x.contiguous(at::MemoryFormat::ChannelsLast)))) << n << " threads";
  }
  at::set_num_threads(threads);
}

TEST(QuantizedConv2d, ScalesOfFrequenciesAreWorthFifteenDecibels) {
  at::manual_seed(7);
  const Tensor x = images(1, 32, 44), weight = at::randn({16, 32, 3, 3}), expected = at::conv2d(x, weight);
  for (const ConvAlgorithm& axis : {sfc_algorithm(4, 4, 3), sfc_algorithm(6, 6, 3), sfc_algorithm(6, 7, 3)}) {
    const double each = sqnr(by_integers(x, weight, axis, of_bits(8)), expected);
    const double one = sqnr(by_integers(x, weight, axis, of_bits(8, Strategy::kTensor)), expected);
    EXPECT_GT(each, one + 15) << axis.points << " points, " << axis.outputs << " outputs";
  }
}

/// Mean over draws of images of 6 channels and 3 x 3 tiles, as the derivation measures them.
struct Errors {
  double direct = 0, tiles = 0;
};
Errors mean_errors(const ConvAlgorithm& axis, int64_t bits) {
  constexpr int kDraws = 40;
  Errors errors;
  for (int draw = 0; draw < kDraws; ++draw) {
    at::manual_seed(100 + draw);
    const Tensor x = images(1, 6, 3 * axis.outputs + 2), weight = at::randn({3, 6, 3, 3});
    const Tensor expected = at::conv2d(x, weight);
    errors.direct += sqnr(direct_quantized(x, weight, bits), expected) / kDraws;
    errors.tiles += sqnr(by_integers(x, weight, axis, of_bits(bits)), expected) / kDraws;
  }
  return errors;
}

TEST(QuantizedConv2d, EightBitsAreAtLeastAsGoodAsDirectAndWinogradIsFourDecibelsWorse) {
  for (const ConvAlgorithm& axis : {sfc_algorithm(4, 4, 3), sfc_algorithm(6, 6, 3), sfc_algorithm(6, 7, 3)}) {
    const Errors errors = mean_errors(axis, 8);
    EXPECT_GE(errors.tiles, errors.direct) << axis.outputs << " outputs";
  }
  const Errors winograd = mean_errors(winograd_algorithm(4, 3), 8);
  EXPECT_LE(winograd.tiles, winograd.direct - 4);
}

TEST(QuantizedConv2d, SearchedScalesAreBetterAtFourBits) {
  at::manual_seed(9);
  const Tensor x = images(2, 32, 44), weight = at::randn({16, 32, 3, 3}), expected = at::conv2d(x, weight);
  for (const ConvAlgorithm& axis : {sfc_algorithm(4, 4, 3), sfc_algorithm(6, 6, 3)}) {
    ConvQuantization q = of_bits(4);
    const double whole_range = sqnr(by_integers(x, weight, axis, q), expected);
    q.search = MseSearch{.norm = 2};
    EXPECT_GT(sqnr(by_integers(x, weight, axis, q), expected), whole_range + 1);
  }
}

TEST(QuantizedConv2d, OneDimensionalAndConstantInputsAreFine) {
  at::manual_seed(10);
  const Tensor x = at::randn({2, 20, 1, 90}), weight = at::randn({18, 20, 1, 3});
  const ConvAlgorithm2d audio = tile_algorithm(direct_algorithm(1), sfc_algorithm(6, 6, 3));
  const Padding causal{.left = 2};
  const Tensor y = IntegerConv2d(quantize_conv2d(weight, {}, x, audio, causal, of_bits(8)))(x);
  EXPECT_GT(sqnr(y, at::conv2d(at::constant_pad_nd(x, {2, 0}), weight)), 35);
  const Tensor zero = at::zeros({1, 20, 1, 30}), bias = at::randn({18});
  const Tensor z = IntegerConv2d(quantize_conv2d(weight, bias, zero, audio, causal, of_bits(8)))(zero);
  EXPECT_TRUE(at::allclose(z, bias.view({1, -1, 1, 1}).expand_as(z)));
}

TEST(QuantizedConv2d, RefusesWhatItCannotRun) {
  const ConvAlgorithm2d algorithm = tile_algorithm(sfc_algorithm(6, 6, 3));
  const Tensor x = at::randn({1, 4, 9, 9}), weight = at::randn({5, 4, 3, 3});
  ConvQuantization asymmetric = of_bits(8);
  asymmetric.activations.symmetric = false;
  EXPECT_THROW(quantize_conv2d(weight, {}, x, algorithm, {}, asymmetric), c10::Error);
  EXPECT_THROW(quantize_conv2d(weight, {}, x, algorithm, {}, of_bits(9)), c10::Error);
  EXPECT_THROW(quantize_conv2d(at::randn({5, 3, 3, 3}), {}, x, algorithm, {}, of_bits(8)), c10::Error);
  EXPECT_THROW(quantize_conv2d(weight, at::zeros({4}), x, algorithm, {}, of_bits(8)), c10::Error);
  QuantizedConv2d layer = quantize_conv2d(weight, {}, x, algorithm, {}, of_bits(8));
  const IntegerConv2d conv(layer);
  EXPECT_THROW(conv(at::randn({1, 3, 9, 9})), c10::Error);
  EXPECT_THROW(conv(x.to(at::kDouble)), c10::Error);
  layer.input_scale = layer.input_scale.slice(0, 1);
  EXPECT_THROW(IntegerConv2d{layer}, c10::Error);
}

}  // namespace
}  // namespace baseq
