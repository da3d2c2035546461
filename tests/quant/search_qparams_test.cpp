#include <ATen/ATen.h>
#include <ATen/Parallel.h>
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

TEST(SearchQparams, FewOfManyRatiosFindALossWithinATenthOfAPercentOfTheLeast) {
  at::manual_seed(5);
  const auto heavy = [](const Tensor& x) { return x / at::rand_like(x).clamp_min(1e-2); };
  const std::vector<Tensor> samples = {at::randn({64, 512}), at::randn({64, 512}).pow(3), heavy(at::randn({64, 512})),
                                       at::rand({64, 512}) - 0.3};
  for (size_t sample = 0; sample < samples.size(); ++sample) {
    const Tensor& x = samples[sample];
    for (const int64_t num_bits : {2, 3, 4, 8}) {
      for (const bool symmetric : {true, false}) {
        for (const int64_t group_size : {32, 128, 512}) {
          const QuantSpec spec{
              .num_bits = num_bits, .symmetric = symmetric, .strategy = Strategy::kGroup, .group_size = group_size};
          const MseSearch search;
          const auto losses_of = [&](const QParams& qparams) {
            return group_view((fake_quantize(x, qparams, spec) - x).abs().to(at::kDouble).pow(search.norm), spec)
                .sum(-1);
          };
          Tensor least;
          for (int64_t step = 0; step < search.num_steps; ++step) {
            const double ratio =
                1 - search.max_shrink * static_cast<double>(step) / static_cast<double>(search.num_steps);
            const Tensor losses = losses_of(compute_qparams(x, spec, at::full({1}, ratio)));
            least = least.defined() ? at::minimum(least, losses) : losses;
          }
          const Tensor found = losses_of(search_qparams(x, spec, search));
          EXPECT_LT((found.sum() / least.sum()).item<double>(), 1.001)
              << "sample " << sample << ", " << num_bits << " bits, groups of " << group_size;
          EXPECT_LT((found / least).mean().item<double>(), 1.001);
        }
      }
    }
  }
}

TEST(SearchQparams, ThreadsDoNotChangeABit) {
  at::manual_seed(6);
  const Tensor few = at::randn({3, 40000}).pow(3), many = at::randn({300, 64});
  const int threads = at::get_num_threads();
  std::vector<Tensor> scales;
  for (const int count : {1, 2, 3}) {
    at::set_num_threads(count);
    for (const Strategy strategy : {Strategy::kTensor, Strategy::kChannel}) {
      const QuantSpec spec{.num_bits = 3, .strategy = strategy};
      for (const Tensor& x : {few, many}) scales.push_back(search_qparams(x, spec).scale);
    }
  }
  at::set_num_threads(threads);
  for (size_t i = 4; i < scales.size(); ++i) EXPECT_TRUE(at::equal(scales[i], scales[i % 4])) << i;
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
