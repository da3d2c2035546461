#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <tuple>
#include <vector>

#include "baseq/conv/conv.h"

namespace baseq {
namespace {

/// sum_t output[k, t] filter[t, j] input[t, i] for all k, j, i: what the algorithm makes of tap j and sample i.
Tensor composition(const Tensor& output, const Tensor& filter, const Tensor& input) {
  const Tensor o = output.to(at::kDouble), f = filter.to(at::kDouble), i = input.to(at::kDouble);
  return (o.unsqueeze(1) * f.t().unsqueeze(0)).matmul(i);
}

/// divisor where i = k + j, zero elsewhere; [outputs, taps, samples]
Tensor correlation(int64_t outputs, int64_t taps, double divisor) {
  Tensor result = at::zeros({outputs, taps, outputs + taps - 1}, at::kDouble);
  for (int64_t k = 0; k < outputs; ++k) {
    for (int64_t j = 0; j < taps; ++j) result[k][j][k + j] = divisor;
  }
  return result;
}

void expect_exact(const ConvAlgorithm& a) {
  const Tensor got = composition(a.output_transform, a.filter_transform, a.input_transform);
  EXPECT_TRUE(at::equal(got, correlation(a.outputs, a.taps, static_cast<double>(a.divisor))))
      << a.points << " points, " << a.outputs << " outputs, " << a.taps << " taps";
}

void expect_exact(const ConvAlgorithm2d& a) {
  const auto divisor = static_cast<double>(a.divisor);
  // Rows times columns, with the indices of an axis side by side: [k l, i j, m n]
  const Tensor down = correlation(a.rows.outputs, a.rows.taps, 1), across = correlation(a.cols.outputs, a.cols.taps, 1);
  const Tensor expected = at::einsum("kim,ljn->klijmn", {down, across})
                              .reshape({a.rows.outputs * a.cols.outputs, a.rows.taps * a.cols.taps, -1});
  EXPECT_TRUE(at::equal(composition(a.output_matrix(), a.filter_matrix(), a.input_matrix()), expected * divisor))
      << a.rows.points << " points, " << a.rows.outputs << " outputs, " << a.rows.taps << " taps";
}

/// points, outputs, taps, products of the symbolic and of the folded form
struct Named {
  int64_t points, outputs, taps, symbolic, folded;
};
constexpr Named kNamed[] = {
    {4, 4, 3, 46, 49}, {6, 6, 3, 88, 100}, {6, 7, 3, 132, 144}, {6, 6, 5, 184, 196}, {6, 4, 7, 184, 196}};

TEST(ConvAlgorithm, EveryAxisIsExactlyTheCorrelation) {
  int checked = 0;
  for (const int64_t points : {3, 4, 6}) {
    for (int64_t outputs = 1; outputs <= 10; ++outputs) {
      for (int64_t taps = 1; taps <= 9; ++taps) {
        if (outputs + taps - 1 < points) continue;
        const ConvAlgorithm a = sfc_algorithm(points, outputs, taps);
        expect_exact(a);
        EXPECT_LE(a.input_transform.abs().max().item<int64_t>(), 1);
        EXPECT_LE(a.filter_transform.abs().max().item<int64_t>(), 1);
        ++checked;
      }
    }
  }
  EXPECT_EQ(checked, 246);
  for (int64_t outputs = 1; outputs <= 6; ++outputs) {
    for (int64_t taps = 1; outputs + taps - 1 <= 8; ++taps) expect_exact(winograd_algorithm(outputs, taps));
  }
  for (int64_t taps = 1; taps <= 7; ++taps) expect_exact(direct_algorithm(taps));
}

TEST(ConvAlgorithm, TilesAreExactlyTheCorrelationWithThePapersNumberOfProducts) {
  for (const auto& [points, outputs, taps, symbolic, folded] : kNamed) {
    const ConvAlgorithm axis = sfc_algorithm(points, outputs, taps);
    const ConvAlgorithm2d plain = tile_algorithm(axis), shared = tile_algorithm(axis, ConvForm::kSymbolic);
    EXPECT_EQ(plain.num_products(), folded);
    EXPECT_EQ(shared.num_products(), symbolic);
    expect_exact(plain);
    expect_exact(shared);
    EXPECT_LE(shared.input_matrix().abs().max().item<int64_t>(), 1);
    EXPECT_LE(shared.filter_matrix().abs().max().item<int64_t>(), 1);
  }
  expect_exact(tile_algorithm(sfc_algorithm(3, 3, 3), ConvForm::kSymbolic));
  expect_exact(tile_algorithm(sfc_algorithm(6, 6, 3), sfc_algorithm(6, 4, 4), ConvForm::kSymbolic));
  expect_exact(tile_algorithm(direct_algorithm(3), sfc_algorithm(4, 4, 3)));
  expect_exact(tile_algorithm(winograd_algorithm(4, 3)));
}

TEST(ConvAlgorithm, SixPointsWithSixOutputsOfThreeTapsAreTheDerivedMatrices) {
  const ConvAlgorithm a = sfc_algorithm(6, 6, 3);
  const std::vector<int64_t> input = {0,  1, 1,  1, 1, 1,  1, 0,  0,  1, 1,  0, -1, -1, 0, 0,  0, 0, -1, -1,
                                      0,  1, 1,  0, 0, 1,  0, -1, -1, 0, 1,  0, 0,  1,  0, -1, 1, 0, -1, 0,
                                      0,  0, -1, 1, 0, -1, 1, 0,  0,  1, -1, 0, 1,  -1, 0, 0,  0, 1, -1, 1,
                                      -1, 1, -1, 0, 1, 0,  0, 0,  0,  0, -1, 0, 0,  -1, 0, 0,  0, 0, 0,  1};
  const std::vector<int64_t> filter = {1, 1, 1,  1, 0, -1, 0, 1,  1, 1, 1, 0, 1, -1, 0,
                                       0, 1, -1, 1, 0, -1, 1, -1, 1, 1, 0, 0, 0, 0,  1};
  const std::vector<int64_t> output = {1, -1, -1, 2,  -2, 1,  1,  -1, 6, 0, 1, 1,  -2, 1,  1,  -2, 1,  1, 0, 0,
                                       1, 2,  -1, -1, 1,  1,  -2, -1, 0, 0, 1, 1,  1,  -2, -2, 1,  1,  1, 0, 0,
                                       1, -1, 2,  -1, 1,  -2, 1,  -1, 0, 0, 1, -2, 1,  1,  1,  1,  -2, 1, 0, 6};
  EXPECT_TRUE(at::equal(a.input_transform, at::tensor(input, at::kLong).view({10, 8})));
  EXPECT_TRUE(at::equal(a.filter_transform, at::tensor(filter, at::kLong).view({10, 3})));
  EXPECT_TRUE(at::equal(a.output_transform, at::tensor(output, at::kLong).view({6, 10})));
  EXPECT_EQ(a.divisor, 6);
}

TEST(ConvAlgorithm, WinogradIsTheKnownTransform) {
  const ConvAlgorithm a = winograd_algorithm(4, 3);
  const std::vector<int64_t> input = {4, 0,  -5, 0, 1, 0, 0, -4, -4, 1,  1, 0, 0, 4, -4, -1, 1, 0,
                                      0, -2, -1, 2, 1, 0, 0, 2,  -1, -2, 1, 0, 0, 4, 0,  -5, 0, 1};
  const std::vector<int64_t> filter = {6, 0, 0, -4, -4, -4, -4, 4, -4, 1, 2, 4, 1, -2, 4, 0, 0, 24};
  EXPECT_TRUE(at::equal(a.input_transform, at::tensor(input, at::kLong).view({6, 6})));
  EXPECT_TRUE(at::equal(a.filter_transform, at::tensor(filter, at::kLong).view({6, 3})));
  EXPECT_EQ(a.divisor, 24);
  EXPECT_EQ(tile_algorithm(winograd_algorithm(2, 3)).num_products(), 16);
  EXPECT_EQ(tile_algorithm(a).num_products(), 36);
}

TEST(ConvAlgorithm, RefusesWhatItHasNoTransformFor) {
  EXPECT_THROW(sfc_algorithm(5, 5, 3), c10::Error);
  EXPECT_THROW(sfc_algorithm(6, 2, 3), c10::Error);  // four samples for a circle of six
  EXPECT_THROW(sfc_algorithm(6, 0, 9), c10::Error);
  EXPECT_THROW(winograd_algorithm(8, 3), c10::Error);
  EXPECT_THROW(direct_algorithm(0), c10::Error);
  EXPECT_THROW(tile_algorithm(winograd_algorithm(4, 3), ConvForm::kSymbolic), c10::Error);
  EXPECT_THROW(tile_algorithm(sfc_algorithm(4, 4, 3), sfc_algorithm(6, 6, 3), ConvForm::kSymbolic), c10::Error);
}

}  // namespace
}  // namespace baseq
