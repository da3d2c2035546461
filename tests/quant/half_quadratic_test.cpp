#include "quant/half_quadratic.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "../random_tensors.h"

namespace baseq {
namespace {

/// Weights with a few outliers.
Tensor heavy_tailed(at::IntArrayRef sizes, uint64_t seed) {
  return test::random_normal(sizes, seed, at::kFloat) * test::random_normal(sizes, seed + 1, at::kFloat).exp() * 0.02;
}

QuantSpec in_groups(int64_t num_bits, bool symmetric, at::ScalarType dtype = at::kFloat) {
  return {.num_bits = num_bits,
          .symmetric = symmetric,
          .strategy = Strategy::kGroup,
          .group_size = 32,
          .scale_dtype = dtype};
}

/// sum |error|^0.7 of each group.
Tensor errors_of(const Tensor& weight, const QParams& qparams, const QuantSpec& spec) {
  return group_view(weight - fake_quantize(weight, qparams, spec), spec).abs().pow(0.7).sum(-1);
}

TEST(HalfQuadratic, TheErrorOfNoGroupGrowsWithTheIterations) {
  const Tensor weight = heavy_tailed({20, 128}, 1);
  for (const int64_t num_bits : {2, 3, 4, 8}) {
    for (const bool symmetric : {true, false}) {
      for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
        const QuantSpec spec = in_groups(num_bits, symmetric, dtype);
        Tensor last = errors_of(weight, compute_qparams(weight, spec), spec);
        const double start = last.sum().item<double>();
        for (const int64_t iterations : {0, 1, 2, 5, 20}) {
          const QParams qparams = half_quadratic_qparams(weight, spec, {.num_iterations = iterations});
          const Tensor errors = errors_of(weight, qparams, spec);
          EXPECT_TRUE(errors.le(last * (1 + 1e-6)).all().item<bool>()) << num_bits << " bits, " << iterations;
          last = errors;
        }
        // With many codes the grid that covers everything is hard to beat.
        EXPECT_LE(last.sum().item<double>(), (num_bits > 4 ? 1.000001 : 0.98) * start)
            << num_bits << " bits, symmetric " << symmetric;
      }
    }
  }
}

TEST(HalfQuadratic, WithoutIterationsItIsTheGridThatCoversEverything) {
  const Tensor weight = heavy_tailed({6, 64}, 3);
  for (const bool symmetric : {true, false}) {
    const QuantSpec spec = in_groups(4, symmetric);
    const QParams got = half_quadratic_qparams(weight, spec, {.num_iterations = 0}),
                  all = compute_qparams(weight, spec);
    EXPECT_TRUE(at::equal(got.scale, all.scale));
    EXPECT_EQ(got.zero_point.defined(), !symmetric);
    if (!symmetric) {
      EXPECT_TRUE(at::equal(got.zero_point, all.zero_point));
    }
  }
}

TEST(HalfQuadratic, AUnitOfTheWeightChangesTheScalesAlone) {
  const Tensor weight = heavy_tailed({6, 64}, 4);
  const QuantSpec spec = in_groups(3, false);
  const QParams small = half_quadratic_qparams(weight, spec), large = half_quadratic_qparams(1024 * weight, spec);
  EXPECT_TRUE(at::equal(small.scale * 1024, large.scale));
  EXPECT_TRUE(at::equal(small.zero_point, large.zero_point));
}

TEST(HalfQuadratic, IsAMethodOfTheSearch) {
  const Tensor weight = heavy_tailed({6, 64}, 5);
  const MseSearch search{.method = MseSearch::Method::kHalfQuadratic};
  for (const Strategy strategy : {Strategy::kTensor, Strategy::kChannel, Strategy::kGroup}) {
    QuantSpec spec = in_groups(3, false);
    spec.strategy = strategy;
    const QParams got = search_qparams(weight, spec, search), expected = half_quadratic_qparams(weight, spec);
    EXPECT_EQ(got.scale.sizes(), compute_qparams(weight, spec).scale.sizes());
    EXPECT_TRUE(at::equal(got.scale, expected.scale));
    EXPECT_TRUE(at::equal(got.zero_point, expected.zero_point));
  }
}

TEST(HalfQuadratic, ZerosAndConstantsHaveAGrid) {
  for (const double value : {0.0, 0.5, -2.0}) {
    const Tensor weight = at::full({2, 32}, value);
    for (const bool symmetric : {true, false}) {
      const QuantSpec spec = in_groups(2, symmetric);
      const QParams qparams = half_quadratic_qparams(weight, spec);
      EXPECT_TRUE(qparams.scale.isfinite().all().item<bool>() && qparams.scale.gt(0).all().item<bool>());
      EXPECT_LT((fake_quantize(weight, qparams, spec) - weight).abs().max().item<double>(),
                0.34 * std::abs(value) + 1e-9);
    }
  }
  EXPECT_THROW(half_quadratic_qparams(at::ones({2, 2}), {.dynamic = true}), c10::Error);
}

}  // namespace
}  // namespace baseq
