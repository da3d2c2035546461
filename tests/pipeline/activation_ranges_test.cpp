#include "pipeline/activation_ranges.h"

#include <gtest/gtest.h>

#include <cmath>

#include "block_test.h"
#include "pipeline/merge.h"

namespace baseq {
namespace {

class ActivationRanges : public testing::Test {
 protected:
  test::TinyShape shape;
  DecoderLayer layer = test::tiny_layer(shape, 3);
  RotaryEmbedding rope = test::tiny_rope(shape, 10);
  Tensor windows = test::random_normal({2, 10, shape.hidden_size}, 4);
};

/// A slow reading of the definition, row after row in float64.
void expect_range(const ActivationRange& got, const Tensor& values, int64_t row_size) {
  const Tensor rows = values.reshape({-1, row_size}).contiguous();
  double min = INFINITY, max = -INFINITY, energy = 0, peaks = 0;
  for (int64_t i = 0; i < rows.size(0); ++i) {
    double largest = 0, sum = 0;
    for (int64_t j = 0; j < row_size; ++j) {
      const double x = rows[i][j].item<double>();
      min = std::min(min, x);
      max = std::max(max, x);
      largest = std::max(largest, std::abs(x));
      sum += x * x;
    }
    energy += sum;
    peaks += largest / std::sqrt(sum / double(row_size));
  }
  EXPECT_NEAR(got.min, min, 1e-5);
  EXPECT_NEAR(got.max, max, 1e-5);
  EXPECT_NEAR(got.rms, std::sqrt(energy / double(rows.numel())), 1e-5);
  EXPECT_NEAR(got.peak, peaks / double(rows.size(0)), 1e-5);
}

TEST_F(ActivationRanges, AreThoseOfTheDefinition) {
  const auto ranges = activation_ranges(layer, windows, rope);
  ASSERT_EQ(ranges.size(), 6U);
  const Tensor x = layer.input_of(Site::kQkv, windows, rope);
  expect_range(ranges.at("self_attn.input_quant"), x, shape.hidden_size);
  expect_range(ranges.at("self_attn.v_cache_quant"), layer.self_attn.v_proj.forward(x), shape.head_dim);
  expect_range(ranges.at("self_attn.o_proj.input_quant"), layer.input_of(Site::kO, windows, rope),
               shape.num_heads * shape.head_dim);
  expect_range(ranges.at("mlp.input_quant"), layer.input_of(Site::kGateUp, windows, rope), shape.hidden_size);
  expect_range(ranges.at("mlp.down_proj.input_quant"), layer.input_of(Site::kDown, windows, rope),
               shape.intermediate_size);
}

TEST_F(ActivationRanges, AreOfWhatTheGridIsGiven) {
  // Gain and shift count, the grid does not, whether or not the shift has moved into the biases already.
  const Tensor plain = layer.input_of(Site::kDown, windows, rope);
  QuantPoint& point = layer.mlp.down_input;
  point.enabled = true;
  point.spec.num_bits = 2;
  point.gain = test::random_normal({shape.intermediate_size}, 5).abs() + 0.5;
  point.shift = test::random_normal({shape.intermediate_size}, 6);
  point.clip = at::full({1, 2}, 0.75, at::kDouble);
  for (const bool merged : {false, true}) {
    if (merged) merge_corrections(layer);
    const auto ranges = activation_ranges(layer, windows, rope);
    const auto points = measure_points(7, ranges, ranges, layer);
    ASSERT_EQ(points.size(), 6U);
    const PointMeasured& last = points.back();
    EXPECT_EQ(last.name, "mlp.down_proj.input_quant");
    EXPECT_EQ(last.block, 7);
    EXPECT_TRUE(last.enabled);
    EXPECT_FALSE(points.front().enabled);
    expect_range(last.after, plain * point.gain - point.shift, shape.intermediate_size);
    EXPECT_EQ(last.clip, (std::vector<double>{0.75, 0.75}));
    EXPECT_EQ(last.min_gain, point.gain.min().item<double>());
    EXPECT_EQ(last.max_shift, point.shift.abs().max().item<double>());
  }
}

TEST_F(ActivationRanges, AHadamardTransformLowersThePeakOfASpike) {
  layer.input_layernorm.weight[3] = 100.0;
  const auto before = activation_ranges(layer, windows, rope);
  const ModelConfig config = test::tiny_model_config(shape);
  layer = realize(layer, test::with_hadamards(config, {Site::kQkv, Site::kGateUp}), {config, 0, at::kDouble});
  const auto after = activation_ranges(layer, windows, rope);
  const char* name = "self_attn.input_quant";
  EXPECT_GT(before.at(name).peak, 0.9 * std::sqrt(double(shape.hidden_size)));
  EXPECT_LT(after.at(name).peak, 2);
  EXPECT_NEAR(after.at(name).rms, before.at(name).rms, 1e-4 * before.at(name).rms);
}

}  // namespace
}  // namespace baseq
