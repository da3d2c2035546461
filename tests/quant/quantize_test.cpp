#include "baseq/quant/quantize.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include "baseq/quant/gptq.h"

namespace baseq {
namespace {

std::vector<QuantSpec> all_specs() {
  std::vector<QuantSpec> specs;
  for (int64_t num_bits = 2; num_bits <= 8; ++num_bits) {
    for (const bool symmetric : {true, false}) {
      for (const bool dynamic : {true, false}) {
        for (const Strategy strategy : {Strategy::kTensor, Strategy::kChannel, Strategy::kGroup, Strategy::kToken}) {
          specs.push_back({.num_bits = num_bits,
                           .symmetric = symmetric,
                           .strategy = strategy,
                           .group_size = 8,
                           .dynamic = dynamic});
        }
      }
    }
  }
  return specs;
}

std::string name_of(const QuantSpec& spec) {
  return std::to_string(spec.num_bits) + " bits, symmetric " + std::to_string(spec.symmetric) + ", strategy " +
         std::to_string(static_cast<int>(spec.strategy)) + ", dynamic " + std::to_string(spec.dynamic);
}

Tensor grad_of(const Tensor& output, const Tensor& input, const Tensor& weights) {
  input.mutable_grad() = Tensor();
  (output * weights).sum().backward();
  return input.grad().clone();
}

/// Central differences of sum(f(x) * weights), everything in float64.
template <class Fn>
Tensor numeric_grad(const Fn& f, const Tensor& x, const Tensor& weights, double step = 1e-6) {
  const at::NoGradGuard no_grad;
  const Tensor grad = at::zeros_like(x).contiguous();
  const Tensor flat = grad.view(-1);
  for (int64_t i = 0; i < x.numel(); ++i) {
    Tensor moved = x.detach().clone().contiguous();
    moved.view(-1)[i] += step;
    const double above = (f(moved) * weights).sum().template item<double>();
    moved.view(-1)[i] -= 2 * step;
    const double below = (f(moved) * weights).sum().template item<double>();
    flat[i] = (above - below) / (2 * step);
  }
  return grad;
}

TEST(Quantize, ErrorIsAtMostHalfAStepInsideTheGridAndAtMostOneStepOverall) {
  at::manual_seed(1);
  for (const QuantSpec& spec : all_specs()) {
    const Tensor x = at::randn({6, 3, 32}) * at::rand({6, 1, 1}).exp() + at::randn({6, 3, 1});
    const QParams qparams = compute_qparams(x, spec);
    const Tensor codes = quantize(x, qparams, spec);
    EXPECT_EQ(codes.scalar_type(), at::kChar);
    EXPECT_EQ(codes.sizes(), x.sizes());
    EXPECT_GE(codes.min().item<int64_t>(), -(1 << (spec.num_bits - 1)));
    EXPECT_LE(codes.max().item<int64_t>(), (1 << (spec.num_bits - 1)) - 1);
    const Tensor steps = group_view(dequantize(codes, qparams, spec) - x, spec).abs() / qparams.scale.unsqueeze(-1);
    // The zero point of a static asymmetric grid is an integer, which moves the ends of the range by half a step.
    const double bound = spec.symmetric || spec.dynamic ? 0.5 : 1.0;
    EXPECT_LE(steps.max().item<double>(), bound + 1e-3) << name_of(spec);
  }
}

TEST(Quantize, ZeroRowsStayZero) {
  for (QuantSpec spec : all_specs()) {
    for (const at::ScalarType dtype : {at::kFloat, at::kHalf, at::kBFloat16}) {
      spec.scale_dtype = dtype;
      const Tensor x = at::zeros({3, 16});
      const QParams qparams = compute_qparams(x, spec);
      EXPECT_TRUE(at::equal(dequantize(quantize(x, qparams, spec), qparams, spec), x)) << name_of(spec);
      EXPECT_TRUE(at::equal(fake_quantize(x, qparams, spec), x)) << name_of(spec);
    }
  }
}

TEST(Quantize, ConstantRowsKeepTheirValue) {
  for (const QuantSpec& spec : all_specs()) {
    for (const double value : {-3.0, 0.25, 700.0}) {
      const Tensor x = at::full({3, 16}, value);
      const Tensor y = fake_quantize(x, compute_qparams(x, spec), spec);
      // A symmetric grid has no code for its positive end: 7 of 7.5 steps.
      const double tolerance = spec.symmetric ? 0.5 / ((1 << spec.num_bits) - 1) * 2 : 1e-5;
      EXPECT_LE(((y - x).abs().max() / std::abs(value)).item<double>(), tolerance + 1e-6) << name_of(spec);
    }
  }
}

// Exact: the quotient (s * q) / s rounds to within a relative 2^-23 of the integer q, far less than half a step. With a
// real zero point the position (q - z) + z is off by an ulp of z, so the code, and with it the value, is the same.
TEST(Quantize, QuantizingTwiceChangesNothing) {
  at::manual_seed(2);
  for (const QuantSpec& spec : all_specs()) {
    const Tensor x = at::randn({5, 32}) * 3 + 1;
    const QParams qparams = compute_qparams(x, spec);
    const Tensor once = fake_quantize(x, qparams, spec);
    EXPECT_TRUE(at::equal(fake_quantize(once, qparams, spec), once)) << name_of(spec);
  }
}

TEST(Quantize, FakeQuantizeEqualsQuantizeThenDequantize) {
  at::manual_seed(3);
  for (const QuantSpec& spec : all_specs()) {
    const Tensor x = at::randn({5, 32});
    const QParams qparams = compute_qparams(x, spec, at::full({1}, 0.8));
    EXPECT_TRUE(at::equal(fake_quantize(x, qparams, spec), dequantize(quantize(x, qparams, spec), qparams, spec)))
        << name_of(spec);
  }
}

TEST(Quantize, SymmetricScaleIsAbsmaxOverSevenAndAHalfAtFourBits) {
  const Tensor x = at::tensor({-7.5, 1.5, 15.0, -15.0}, at::kFloat).view({2, 2});
  const QuantSpec spec{.num_bits = 4, .symmetric = true, .strategy = Strategy::kChannel};
  const QParams qparams = compute_qparams(x, spec);
  EXPECT_FALSE(qparams.zero_point.defined());
  EXPECT_TRUE(at::allclose(qparams.scale, at::tensor({1.0, 2.0}).view({2, 1}).to(at::kFloat)));
  EXPECT_TRUE(at::equal(quantize(x, qparams, spec), at::tensor({-8, 2, 7, -8}, at::kChar).view({2, 2})));
}

TEST(Quantize, StaticAsymmetricGridIncludesZeroAndHasAnIntegerZeroPoint) {
  const Tensor x = at::tensor({3.0, 15.0, -15.0, -3.0}, at::kFloat).view({2, 2});
  const QuantSpec spec{.num_bits = 4, .symmetric = false, .strategy = Strategy::kChannel};
  const QParams qparams = compute_qparams(x, spec);
  EXPECT_TRUE(at::allclose(qparams.scale, at::ones({2, 1})));
  EXPECT_TRUE(at::equal(qparams.zero_point, at::tensor({-8.0, 7.0}).view({2, 1}).to(at::kFloat)));
  EXPECT_TRUE(at::equal(quantize(x, qparams, spec), at::tensor({-5, 7, -8, 4}, at::kChar).view({2, 2})));
}

TEST(Quantize, DynamicAsymmetricClipShrinksBothEndsTowardsTheMiddle) {
  const Tensor x = at::tensor({2.0, 4.0, 10.0, 12.0}).view({1, 4});
  const QuantSpec spec{.num_bits = 4, .symmetric = false, .strategy = Strategy::kToken, .dynamic = true};
  const QParams qparams = compute_qparams(x, spec, at::full({1, 1}, 0.8));
  EXPECT_NEAR(qparams.scale.item<double>(), (11.0 - 3.0) / 15, 1e-6);
  const Tensor y = fake_quantize(x, qparams, spec);
  EXPECT_NEAR(y.min().item<double>(), 3.0, 1e-5);
  EXPECT_NEAR(y.max().item<double>(), 11.0, 1e-5);
}

TEST(Quantize, RoundsTiesToEven) {
  const QuantSpec spec{.num_bits = 4};
  const QParams qparams{at::ones({1, 1}), {}};
  const Tensor x = at::tensor({0.5, 1.5, 2.5, -0.5, -1.5, -2.5}).view({1, 6});
  EXPECT_TRUE(at::equal(quantize(x, qparams, spec), at::tensor({0, 2, 2, 0, -2, -2}, at::kChar).view({1, 6})));
}

TEST(Quantize, ScaleDtypeRoundsTheScaleBeforeTheCodes) {
  at::manual_seed(4);
  for (QuantSpec spec : all_specs()) {
    spec.scale_dtype = at::kBFloat16;
    const Tensor x = at::randn({4, 32});
    const QParams qparams = compute_qparams(x, spec);
    EXPECT_EQ(qparams.scale.scalar_type(), at::kFloat);
    EXPECT_TRUE(at::equal(qparams.scale, qparams.scale.to(at::kBFloat16).to(at::kFloat)));
    if (qparams.zero_point.defined() && !spec.dynamic) {
      EXPECT_TRUE(at::equal(qparams.zero_point, qparams.zero_point.round()));
    }
  }
}

TEST(Quantize, KeepsTheDtypeOfTheInput) {
  const QuantSpec spec{.num_bits = 8};
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16}) {
    const Tensor x = at::randn({2, 8}).to(dtype);
    EXPECT_EQ(fake_quantize(x, compute_qparams(x, spec), spec).scalar_type(), dtype);
  }
}

TEST(Quantize, GradientOfTheInputIsOneInsideAndZeroOutside) {
  const QuantSpec spec{.num_bits = 4};
  const QParams qparams{at::full({1, 1}, 0.5), {}};
  const Tensor x = at::tensor({-9.0, -3.0, 0.1, 3.0, 9.0}).to(at::kFloat).view({1, 5}).requires_grad_();
  const Tensor grad = grad_of(fake_quantize(x, qparams, spec), x, at::ones({1, 5}));
  EXPECT_TRUE(at::equal(grad, at::tensor({0.0, 1.0, 1.0, 1.0, 0.0}).to(at::kFloat).view({1, 5})));
}

// The codes are piecewise constant, so what finite differences see of scale and zero point is (code - zero_point) and
// -scale; the straight-through estimate adds -x / scale and +scale on interior entries.
TEST(Quantize, GradientsOfScaleAndZeroPointMatchFiniteDifferencesOfThePiecewiseLinearPart) {
  at::manual_seed(5);
  const auto f64 = at::TensorOptions().dtype(at::kDouble);
  for (const bool symmetric : {true, false}) {
    const QuantSpec spec{.num_bits = 4, .symmetric = symmetric, .strategy = Strategy::kGroup, .group_size = 8};
    const Tensor x = at::randn({3, 16}, f64), weights = at::randn({3, 16}, f64);
    QParams qparams = compute_qparams(x, spec, at::full({1}, 0.6, f64));
    qparams.scale = qparams.scale.detach().requires_grad_();
    if (!symmetric) qparams.zero_point = qparams.zero_point.detach().requires_grad_();
    const auto position = group_view(x, spec) / qparams.scale.detach().unsqueeze(-1) +
                          (symmetric ? at::zeros({1}, f64) : qparams.zero_point.detach().unsqueeze(-1));
    const Tensor inside = ((position.round() >= -8) & (position.round() <= 7)).to(at::kDouble);
    ASSERT_GT(inside.sum().item<double>(), 0);
    ASSERT_LT(inside.mean().item<double>(), 1);
    const Tensor w = group_view(weights, spec);

    const Tensor output = fake_quantize(x, qparams, spec);
    const Tensor scale_grad = grad_of(output, qparams.scale, weights);
    const Tensor by_difference = numeric_grad(
        [&](const Tensor& scale) {
          return fake_quantize(x, {scale, qparams.zero_point}, spec);
        },
        qparams.scale, weights);
    const Tensor estimate = -(w * inside * group_view(x, spec) / qparams.scale.detach().unsqueeze(-1)).sum(-1);
    EXPECT_TRUE(at::allclose(scale_grad, by_difference + estimate, 1e-6, 1e-6));
    if (!symmetric) {
      const Tensor zero_grad = grad_of(fake_quantize(x, qparams, spec), qparams.zero_point, weights);
      const Tensor expected = -(w * (1 - inside)).sum(-1) * qparams.scale.detach();
      EXPECT_TRUE(at::allclose(zero_grad, expected, 1e-9, 1e-9));
    }
  }
}

TEST(Quantize, FusedFloat32GradientsEqualTheFloat64Composite) {
  for (const QuantSpec& spec : all_specs()) {
    at::manual_seed(7);
    const Tensor source = at::randn({4, 16}), weights = at::randn({4, 16});
    std::vector<Tensor> grads;
    for (const at::ScalarType dtype : {at::kFloat, at::kDouble}) {
      const Tensor x = source.clone().to(dtype).requires_grad_();
      QParams qparams = compute_qparams(source, spec, at::full({1}, 0.7));
      qparams.scale = qparams.scale.clone().to(dtype).requires_grad_();
      if (!spec.symmetric) qparams.zero_point = qparams.zero_point.clone().to(dtype).requires_grad_();
      const Tensor y = fake_quantize(x, qparams, spec);
      (y * weights).sum().backward();
      const Tensor zero_grad = spec.symmetric ? at::zeros({1}) : qparams.zero_point.grad().view(-1);
      grads.push_back(at::cat({y.detach().view(-1), x.grad().view(-1), qparams.scale.grad().view(-1), zero_grad}));
    }
    EXPECT_TRUE(at::allclose(grads[0].to(at::kDouble), grads[1].to(at::kDouble), 1e-5, 1e-5)) << name_of(spec);
  }
}

TEST(Quantize, GradientsReachTheInputAndTheClipThroughTheRange) {
  at::manual_seed(6);
  const auto f64 = at::TensorOptions().dtype(at::kDouble);
  for (QuantSpec spec : all_specs()) {
    if (spec.strategy != Strategy::kGroup || (!spec.dynamic && !spec.symmetric)) continue;
    const Tensor x = at::randn({4, 16}, f64).requires_grad_();
    const Tensor clip = at::tensor({0.7, 0.9}, f64).view({2, 1}).requires_grad_();
    const Tensor weights = at::randn({4, 2}, f64);
    const auto range = [&](const Tensor& values, const Tensor& ratio) {
      return compute_qparams(values, spec, ratio).scale;
    };
    const Tensor x_grad = grad_of(range(x, clip), x, weights), clip_grad = grad_of(range(x, clip), clip, weights);
    EXPECT_TRUE(at::allclose(x_grad, numeric_grad([&](const Tensor& v) { return range(v, clip.detach()); }, x, weights),
                             1e-6, 1e-7))
        << name_of(spec);
    EXPECT_TRUE(at::allclose(
        clip_grad, numeric_grad([&](const Tensor& v) { return range(x.detach(), v); }, clip, weights), 1e-6, 1e-7))
        << name_of(spec);
  }
}

TEST(Quantize, AStaticRangeTakesAClipForEitherEnd) {
  at::manual_seed(8);
  const Tensor x = at::randn({3, 16}, at::kDouble);
  for (QuantSpec spec : all_specs()) {
    if (spec.strategy != Strategy::kGroup) continue;
    const int64_t groups = group_view(x, spec).size(1);
    const Tensor ends = at::rand({3, groups, 2}, at::kDouble).add_(0.1);
    if (spec.dynamic) {
      EXPECT_THROW(compute_qparams(x, spec, ends), c10::Error);
      continue;
    }
    const Tensor both = ends.narrow(-1, 0, 1);
    EXPECT_TRUE(
        at::equal(compute_qparams(x, spec, both.expand({3, groups, 2})).scale, compute_qparams(x, spec, both).scale));
    // The ends of the range, where a group has a negative and a positive value.
    Tensor clipped = at::zeros_like(group_view(x, spec));
    clipped.select(-1, 0).copy_(ends.select(-1, 0) * group_view(x, spec).amin(-1).clamp_max(0));
    clipped.select(-1, 1).copy_(ends.select(-1, 1) * group_view(x, spec).amax(-1).clamp_min(0));
    const QParams got = compute_qparams(x, spec, ends), expected = compute_qparams(clipped.view({3, 16}), spec);
    EXPECT_TRUE(at::allclose(got.scale, expected.scale, 1e-12)) << name_of(spec);
    if (!spec.symmetric) {
      EXPECT_TRUE(at::equal(got.zero_point, expected.zero_point)) << name_of(spec);
    }
  }
}

TEST(Quantize, ThrowsOnWrongShapesAndSpecs) {
  const Tensor x = at::randn({2, 12});
  EXPECT_THROW(group_view(x, {.strategy = Strategy::kGroup, .group_size = 8}), c10::Error);
  EXPECT_THROW(compute_qparams(x, {.num_bits = 1}), c10::Error);
  EXPECT_THROW(compute_qparams(x, {.num_bits = 9}), c10::Error);
  EXPECT_THROW(compute_qparams(x, {.strategy = Strategy::kGroup}), c10::Error);
  EXPECT_THROW(compute_qparams(x, {.scale_dtype = at::kInt}), c10::Error);
  EXPECT_THROW(compute_qparams(x, {}, at::ones({3, 3})), c10::Error);
  EXPECT_THROW(quantize(x, {at::ones({3, 1}), {}}, {}), c10::Error);
  EXPECT_THROW(search_qparams(x, {}, {}, at::ones({5})), c10::Error);
}

}  // namespace
}  // namespace baseq
