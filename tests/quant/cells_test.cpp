#include "quant/cells.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "../random_tensors.h"
#include "baseq/quant/gptq.h"
#include "random_codes.h"

namespace baseq {
namespace {

std::vector<QuantSpec> grids_of_cells() {
  std::vector<QuantSpec> specs;
  for (const int64_t num_bits : {2, 3, 8}) {
    for (const bool symmetric : {true, false}) {
      for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
        specs.push_back({.num_bits = num_bits,
                         .symmetric = symmetric,
                         .strategy = Strategy::kGroup,
                         .group_size = 16,
                         .scale_dtype = dtype});
        specs.push_back({.num_bits = num_bits, .symmetric = symmetric, .scale_dtype = dtype});
        specs.push_back({.num_bits = num_bits, .symmetric = symmetric, .strategy = Strategy::kTensor});
      }
    }
  }
  return specs;
}

TEST(Cells, AWeightThatHasTheCodesStaysItself) {
  const Tensor weight = test::random_normal({24, 48}, 1, at::kFloat);
  for (const QuantSpec& spec : grids_of_cells()) {
    for (const bool clip : {false, true}) {
      EXPECT_TRUE(at::equal(nearest_in_cells(weight, round_to_nearest(weight, spec, clip)), weight));
    }
  }
}

TEST(Cells, TheNearestWeightHasTheCodesAndIsNoFurtherThanItMust) {
  const Tensor weight = test::random_normal({24, 48}, 2, at::kFloat),
               other = weight + 0.3 * test::random_normal({24, 48}, 3, at::kFloat);
  for (const QuantSpec& spec : grids_of_cells()) {
    QuantizedWeight rounded = round_to_nearest(weight, spec, /*mse_clip=*/true);
    rounded.codes = quantize(other, rounded.qparams, spec);
    const Tensor nearest = nearest_in_cells(weight, rounded);
    EXPECT_TRUE(at::equal(quantize(nearest, rounded.qparams, spec), rounded.codes));
    // No other weight of these codes is nearer by more than the margin.
    const Tensor step = in_units_of(at::ones_like(weight), rounded.qparams.scale, spec);
    const Tensor excess = (nearest - weight).abs() - (other - weight).abs();
    EXPECT_LE((excess / step).max().item<double>(), 0.0011);
  }
}

TEST(Cells, UnitsAreTheScalesOfTheGroups) {
  const QuantSpec spec{.strategy = Strategy::kGroup, .group_size = 2};
  const Tensor scale = at::tensor({1.0, 2.0, 3.0, 4.0}).view({2, 2});
  EXPECT_TRUE(at::equal(in_units_of(at::ones({2, 4}, at::kDouble), scale.to(at::kDouble), spec),
                        at::tensor({1., 1., 2., 2., 3., 3., 4., 4.}, at::kDouble).view({2, 4})));
}

TEST(Cells, RoundingsOfGridsPassTheGradient) {
  const QuantSpec spec{.num_bits = 3, .symmetric = false, .scale_dtype = at::kBFloat16};
  const Tensor scale = at::rand({5}).add_(0.1).requires_grad_(true);
  const Tensor rounded = round_scale(scale, spec);
  EXPECT_TRUE(at::equal(rounded, scale.to(at::kBFloat16).to(at::kFloat)));
  rounded.sum().backward();
  EXPECT_TRUE(at::equal(scale.grad(), at::ones({5})));
  const Tensor zero_point = at::tensor({-9.0F, -3.4F, 0.6F, 9.0F}).requires_grad_(true);
  const Tensor codes = round_zero_point(zero_point, spec);
  EXPECT_TRUE(at::equal(codes, at::tensor({-4.0F, -3.0F, 1.0F, 3.0F})));
  codes.sum().backward();
  EXPECT_TRUE(at::equal(zero_point.grad(), at::tensor({0.0F, 1.0F, 1.0F, 0.0F})));
}

}  // namespace
}  // namespace baseq
