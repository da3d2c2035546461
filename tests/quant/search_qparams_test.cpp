#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "baseq/quant/quantize.h"

namespace baseq {
namespace {

double loss_of(const Tensor& x, const QParams& qparams, const QuantSpec& spec, double norm, const Tensor& importance) {
  Tensor loss = (fake_quantize(x, qparams, spec) - x).abs().to(at::kDouble).pow(norm);
  if (importance.defined()) loss = loss * importance;
  return loss.sum().item<double>();
}

std::vector<QuantSpec> specs() {
  std::vector<QuantSpec> result;
  for (const bool symmetric : {true, false}) {
    for (const bool dynamic : {true, false}) {
      for (const Strategy strategy : {Strategy::kTensor, Strategy::kChannel, Strategy::kGroup}) {
        for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
          result.push_back({.num_bits = 3,
                            .symmetric = symmetric,
                            .strategy = strategy,
                            .group_size = 40,
                            .dynamic = dynamic,
                            .scale_dtype = dtype});
        }
      }
    }
  }
  return result;
}

TEST(SearchQparams, LossIsTheLeastOfAllRatiosForEveryNormAndImportance) {
  at::manual_seed(1);
  for (const QuantSpec& spec : specs()) {
    for (const double norm : {2.0, 2.4, 1.3}) {
      for (const bool weighted : {false, true}) {
        const Tensor x = at::randn({spec.strategy == Strategy::kChannel ? 70 : 6, 120}).pow(3) * 0.01;
        const Tensor importance = weighted ? at::rand({120}).pow(4) : Tensor();
        const MseSearch search{.norm = norm, .num_steps = 20};
        const double found = loss_of(x, search_qparams(x, spec, search, importance), spec, norm, importance);
        // The best of each group by evaluating all of them.
        const Tensor grouped = group_view(x, spec);
        Tensor least;
        for (int64_t step = 0; step < 20; ++step) {
          const QParams qparams = compute_qparams(x, spec, at::full({1}, 1 - 0.8 * static_cast<double>(step) / 20));
          Tensor loss = (fake_quantize(x, qparams, spec) - x).abs().to(at::kDouble).pow(norm);
          if (weighted) loss = loss * importance;
          loss = group_view(loss, spec).sum(-1);
          least = least.defined() ? at::minimum(least, loss) : loss;
        }
        EXPECT_NEAR(found / least.sum().item<double>(), 1, 1e-5)
            << "norm " << norm << ", strategy " << static_cast<int>(spec.strategy);
        EXPECT_LE(found, loss_of(x, compute_qparams(x, spec), spec, norm, importance) * (1 + 1e-6));
      }
    }
  }
}

TEST(SearchQparams, Float64TakesTheCompositeAndFindsTheSame) {
  at::manual_seed(2);
  const QuantSpec spec{.num_bits = 4, .strategy = Strategy::kGroup, .group_size = 16};
  const Tensor x = at::randn({9, 64}), importance = at::rand({64});
  const QParams fused = search_qparams(x, spec, {}, importance);
  const QParams composite = search_qparams(x.to(at::kDouble), spec, {}, importance);
  EXPECT_TRUE(at::allclose(fused.scale.to(at::kDouble), composite.scale, 1e-6));
}

TEST(SearchQparams, ScalingTheWeightScalesTheResult) {
  at::manual_seed(3);
  const QuantSpec spec{.num_bits = 4};
  const Tensor x = at::randn({4, 256});
  const Tensor scale = search_qparams(x, spec).scale;
  for (const int exponent : {-20, 12}) {
    const double factor = std::ldexp(1.0, exponent);
    EXPECT_TRUE(at::allclose(search_qparams(x * factor, spec).scale, scale * factor));
  }
}

TEST(SearchQparams, ZeroRowsStayZeroAndNeedNoClip) {
  const QuantSpec spec{.num_bits = 4, .symmetric = false};
  const Tensor x = at::zeros({3, 32});
  const QParams qparams = search_qparams(x, spec);
  EXPECT_TRUE(at::equal(fake_quantize(x, qparams, spec), x));
  EXPECT_TRUE(at::equal(qparams.scale, compute_qparams(x, spec).scale));
}

TEST(SearchQparams, OutliersAreClipped) {
  at::manual_seed(4);
  const QuantSpec spec{.num_bits = 4};
  const Tensor x = at::randn({2, 4096});
  x[0][7] = 12.0;
  EXPECT_LT(search_qparams(x, spec).scale[0].item<double>(), 0.7 * compute_qparams(x, spec).scale[0].item<double>());
}

TEST(SearchQparams, ThrowsOnImpossibleSearches) {
  const Tensor x = at::randn({2, 8});
  EXPECT_THROW(search_qparams(x, {}, {.num_steps = 0}), c10::Error);
  EXPECT_THROW(search_qparams(x, {}, {.max_shrink = 1.5}), c10::Error);
  EXPECT_THROW(search_qparams(x, {}, {}, at::ones({9})), c10::Error);
}

}  // namespace
}  // namespace baseq
