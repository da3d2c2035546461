#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "baseq/quant/quantize.h"

namespace baseq {
namespace {

struct PointCase {
  QuantSpec spec;
  bool clip = false;
  bool gain = false, shift = false, add_shift_back = true;
};

std::string name_of(const PointCase& c) {
  return std::to_string(c.spec.num_bits) + " bits, symmetric " + std::to_string(c.spec.symmetric) + ", strategy " +
         std::to_string(static_cast<int>(c.spec.strategy)) + ", clip " + std::to_string(c.clip) + ", gain " +
         std::to_string(c.gain) + ", shift " + std::to_string(c.shift) + ", back " + std::to_string(c.add_shift_back);
}

std::vector<PointCase> all_cases() {
  std::vector<PointCase> cases;
  for (const int64_t num_bits : {2, 4, 8}) {
    for (const bool symmetric : {false, true}) {
      for (const Strategy strategy : {Strategy::kToken, Strategy::kGroup}) {
        for (const bool clip : {false, true}) {
          for (const bool gain : {false, true}) {
            for (const bool shift : {false, true}) {
              for (const bool back : {false, true}) {
                cases.push_back({{.num_bits = num_bits,
                                  .symmetric = symmetric,
                                  .strategy = strategy,
                                  .group_size = 24,
                                  .dynamic = true},
                                 clip,
                                 gain,
                                 shift,
                                 back});
              }
            }
          }
        }
      }
    }
  }
  return cases;
}

/// Leaves that require gradients, and what they were made from.
struct Inputs {
  Tensor x, clip, gain, shift, weights;
  Inputs(const PointCase& c, at::ScalarType dtype) {
    at::manual_seed(7);
    const auto leaf = [&](const Tensor& t) { return t.to(at::kFloat).to(dtype).requires_grad_(); };
    const int64_t features = 72, groups = c.spec.strategy == Strategy::kGroup ? 3 : 1;
    x = leaf(at::randn({2, 5, features}, at::kDouble) * 2);
    weights = at::randn({2, 5, features}, at::kDouble).to(at::kFloat).to(dtype);
    const Tensor ratios = at::rand({groups, 2}, at::kDouble) * 0.4 + 0.55;
    if (c.clip) clip = leaf(ratios.narrow(1, 0, 1).contiguous());
    const Tensor multipliers = at::rand({features}, at::kDouble) + 0.5, offsets = at::randn({features}, at::kDouble);
    if (c.gain) gain = leaf(multipliers);
    if (c.shift) shift = leaf(offsets);
  }
  Tensor run(const PointCase& c) const {
    const Tensor y = fake_quantize_dynamic(x, c.spec, clip, gain, shift, c.add_shift_back);
    (y * weights).sum().backward();
    return y;
  }
};

void expect_close(const Tensor& fused, const Tensor& composite, double tolerance, const std::string& name) {
  ASSERT_EQ(fused.defined(), composite.defined()) << name;
  if (!fused.defined()) return;
  ASSERT_EQ(fused.sizes(), composite.sizes()) << name;
  // Terms of size one or more cancel in some gradients.
  const double scale = std::max(1.0, composite.abs().max().item<double>());
  EXPECT_LE((fused.to(at::kDouble) - composite).abs().max().item<double>(), tolerance * scale) << name;
}

TEST(QuantPoint, FusedFloat32EqualsTheFloat64CompositeInValueAndInEveryGradient) {
  for (const PointCase& c : all_cases()) {
    // Without a clip the largest magnitude of a symmetric row sits on a tie of rounding, which either type breaks its
    // own way.
    if (c.spec.symmetric && !c.clip) continue;
    const Inputs fused(c, at::kFloat), composite(c, at::kDouble);
    expect_close(fused.run(c), composite.run(c), 2e-6, name_of(c) + ": value");
    expect_close(fused.x.grad(), composite.x.grad(), 5e-6, name_of(c) + ": x");
    if (c.clip) expect_close(fused.clip.grad(), composite.clip.grad(), 5e-6, name_of(c) + ": clip");
    if (c.gain) expect_close(fused.gain.grad(), composite.gain.grad(), 5e-6, name_of(c) + ": gain");
    if (c.shift) expect_close(fused.shift.grad(), composite.shift.grad(), 5e-6, name_of(c) + ": shift");
  }
}

TEST(QuantPoint, FusedEqualsQuantizeThenDequantizeOnLongRows) {
  at::manual_seed(3);
  for (const int64_t features : {1, 5, 16, 1025, 4100}) {
    const Tensor x = at::randn({3, features}) + 0.5;
    const QuantSpec spec{.num_bits = 4, .symmetric = false, .strategy = Strategy::kToken, .dynamic = true};
    const QParams qparams = compute_qparams(x, spec);
    const Tensor expected = dequantize(quantize(x, qparams, spec), qparams, spec);
    EXPECT_TRUE(at::allclose(fake_quantize_dynamic(x, spec, {}, {}, {}, true), expected, 1e-5, 1e-5)) << features;
  }
}

TEST(QuantPoint, LongRowsReduceTheirGradientsOverAllSegments) {
  at::manual_seed(4);
  const QuantSpec spec{.num_bits = 4, .symmetric = false, .strategy = Strategy::kToken, .dynamic = true};
  const Tensor source = at::randn({3, 2 * 1024 + 37}), weights = at::randn({3, 2 * 1024 + 37});
  std::vector<Tensor> grads;
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble}) {
    const Tensor x = source.clone().to(dtype).requires_grad_(), clip = at::full({1, 1}, 0.75, dtype).requires_grad_();
    (fake_quantize_dynamic(x, spec, clip, {}, {}, true) * weights.to(dtype)).sum().backward();
    grads.push_back(clip.grad().to(at::kDouble));
    grads.push_back(x.grad().to(at::kDouble));
  }
  EXPECT_TRUE(at::allclose(grads[0], grads[2], 1e-5));
  EXPECT_TRUE(at::allclose(grads[1], grads[3], 1e-5, 1e-4));
}

TEST(QuantPoint, ClippedEntriesAndTheRangeMatchFiniteDifferences) {
  // Every entry sits on an end of the range or outside it, where the output is exactly linear in x, clip and shift.
  const auto f64 = at::TensorOptions().dtype(at::kDouble);
  const QuantSpec spec{.num_bits = 2, .symmetric = false, .strategy = Strategy::kToken, .dynamic = true};
  const Tensor x = at::tensor({-2.0, 3.0, 2.9, -1.9}, f64).view({1, 4}).requires_grad_();
  const Tensor clip = at::tensor({0.55}, f64).view({1, 1}).requires_grad_();
  const Tensor shift = at::tensor({0.1, -0.2, 0.0, 0.05}, f64).requires_grad_();
  const Tensor weights = at::tensor({1.0, -2.0, 0.7, 0.3}, f64).view({1, 4});
  const auto loss = [&](const Tensor& a, const Tensor& b, const Tensor& c) {
    return (fake_quantize_dynamic(a, spec, b, {}, c, true) * weights).sum();
  };
  loss(x, clip, shift).backward();
  const std::vector<Tensor> leaves{x, clip, shift};
  for (size_t which = 0; which < 3; ++which) {
    for (int64_t i = 0; i < leaves[which].numel(); ++i) {
      std::vector<Tensor> above, below;
      for (const Tensor& leaf : leaves) {
        above.push_back(leaf.detach().clone());
        below.push_back(leaf.detach().clone());
      }
      above[which].view(-1)[i] += 1e-6;
      below[which].view(-1)[i] -= 1e-6;
      const double expected =
          (loss(above[0], above[1], above[2]) - loss(below[0], below[1], below[2])).item<double>() / 2e-6;
      EXPECT_NEAR(leaves[which].grad().view(-1)[i].item<double>(), expected, 1e-7) << which << " " << i;
    }
  }
}

TEST(QuantPoint, OneClipBroadcastsOverGroups) {
  at::manual_seed(5);
  const QuantSpec spec{.symmetric = false, .strategy = Strategy::kGroup, .group_size = 8, .dynamic = true};
  const Tensor x = at::randn({4, 32});
  const Tensor expected = fake_quantize_dynamic(x, spec, at::full({4, 1}, 0.75), {}, {}, true);
  for (const Tensor& clip : {at::full({}, 0.75), at::full({1}, 0.75), at::full({1, 1}, 0.75)}) {
    EXPECT_TRUE(at::equal(fake_quantize_dynamic(x, spec, clip, {}, {}, true), expected));
  }
  EXPECT_THROW(fake_quantize_dynamic(x, spec, at::ones({3, 1}), {}, {}, true), c10::Error);
  EXPECT_THROW(fake_quantize_dynamic(x, spec, at::ones({4, 2}), {}, {}, true), c10::Error);
}

TEST(QuantPoint, GradientsDoNotDependOnTheNumberOfThreads) {
  const int threads = at::get_num_threads();
  std::vector<Tensor> grads;
  for (const int count : {1, 2, 3}) {
    at::set_num_threads(count);
    at::manual_seed(6);
    const Tensor x = at::randn({200, 256}).requires_grad_(), gain = at::ones({256}).requires_grad_();
    const Tensor shift = at::randn({256}).requires_grad_(), clip = at::full({1, 1}, 0.8).requires_grad_();
    const QuantSpec spec{.symmetric = false, .strategy = Strategy::kToken, .dynamic = true};
    (fake_quantize_dynamic(x, spec, clip, gain, shift, true) * at::randn({200, 256})).sum().backward();
    grads.push_back(at::cat({gain.grad(), shift.grad(), clip.grad().view(-1), x.grad().view(-1)}));
  }
  at::set_num_threads(threads);
  EXPECT_TRUE(at::equal(grads[0], grads[1]));
  EXPECT_TRUE(at::equal(grads[0], grads[2]));
}

TEST(QuantPoint, ZeroAndConstantRowsAreKept) {
  const QuantSpec spec{.symmetric = false, .strategy = Strategy::kToken, .dynamic = true};
  for (const double value : {0.0, -3.0, 1e4}) {
    const Tensor x = at::full({2, 40}, value).requires_grad_();
    const Tensor y = fake_quantize_dynamic(x, spec, {}, {}, {}, true);
    EXPECT_TRUE(at::equal(y, x));
    y.sum().backward();
    EXPECT_TRUE(x.grad().isfinite().all().item<bool>());
  }
}

TEST(QuantPoint, NanIsNotSwallowed) {
  const QuantSpec spec{.symmetric = false, .strategy = Strategy::kToken, .dynamic = true};
  Tensor x = at::randn({2, 40});
  x[0][3] = NAN;
  const Tensor y = fake_quantize_dynamic(x, spec, {}, {}, {}, true);
  EXPECT_TRUE(y[0][3].isnan().item<bool>());
  EXPECT_FALSE(y[1].isnan().any().item<bool>());
}

TEST(QuantPoint, HalfPrecisionTakesTheCompositeAndKeepsItsType) {
  const QuantSpec spec{.symmetric = false, .strategy = Strategy::kToken, .dynamic = true};
  const Tensor x = at::randn({2, 40});
  const Tensor y = fake_quantize_dynamic(x.to(at::kBFloat16), spec, {}, {}, {}, true);
  EXPECT_EQ(y.scalar_type(), at::kBFloat16);
  EXPECT_LT((y.to(at::kFloat) - fake_quantize_dynamic(x, spec, {}, {}, {}, true)).abs().mean().item<double>(), 0.05);
}

TEST(QuantPoint, DefaultPointPassesItsInputThrough) {
  const Tensor x = at::randn({2, 8});
  EXPECT_TRUE(at::equal(QuantPoint{}.forward(x), x));
}

TEST(QuantPoint, DisabledPointStillAppliesGainAndShift) {
  const Tensor x = at::randn({2, 8}), gain = at::rand({8}) + 0.5, shift = at::randn({8});
  QuantPoint point{.gain = gain, .shift = shift};
  EXPECT_TRUE(at::allclose(point.forward(x), x * gain));
  point.add_shift_back = false;
  EXPECT_TRUE(at::allclose(point.forward(x), x * gain - shift));
}

TEST(QuantPoint, ManyBitsApproachTheDisabledPoint) {
  at::manual_seed(8);
  const Tensor x = at::randn({4, 64});
  for (const bool back : {true, false}) {
    QuantPoint point{.enabled = true, .gain = at::rand({64}) + 0.5, .shift = at::randn({64}), .add_shift_back = back};
    point.spec.num_bits = 8;
    const Tensor quantized = point.forward(x);
    point.enabled = false;
    EXPECT_LT((quantized - point.forward(x)).abs().max().item<double>(), 0.04);
  }
}

TEST(QuantPoint, ObserverSeesWhatReadersSee) {
  Tensor seen;
  QuantPoint point{.enabled = true, .observer = [&](const Tensor& y) { seen = y; }};
  const Tensor y = point.forward(at::randn({2, 8}));
  EXPECT_TRUE(seen.is_same(y));
}

TEST(QuantPoint, ThrowsOnAStaticSpecAndOnWrongShapes) {
  QuantPoint point{.enabled = true};
  point.spec.dynamic = false;
  EXPECT_THROW(point.forward(at::randn({2, 8})), c10::Error);
  const QuantSpec spec{.strategy = Strategy::kToken, .dynamic = true};
  EXPECT_THROW(fake_quantize_dynamic(at::randn({2, 8}), spec, {}, at::ones({4}), {}, true), c10::Error);
  EXPECT_THROW(fake_quantize_dynamic(at::randn({2, 8}), spec, {}, {}, at::ones({4}), true), c10::Error);
}

TEST(QuantPoint, StaticScaleIsThatOfTheCheckpoint) {
  const Tensor x = at::randn({2, 3, 16});
  for (const bool symmetric : {true, false}) {
    QuantPoint point{.enabled = true};
    point.spec = {.num_bits = 8, .symmetric = symmetric, .strategy = Strategy::kTensor};
    point.qparams.scale = at::full({1, 1}, 0.02);
    if (!symmetric) point.qparams.zero_point = at::full({1, 1}, 5.0);
    const double zero = symmetric ? 0 : 5;
    const Tensor expected = (at::clamp(at::round(x / 0.02) + zero, -128, 127) - zero) * 0.02;
    EXPECT_LT((point.forward(x) - expected).abs().max().item<double>(), 1e-6);
  }
}

/// Tokens of two sequences with loud channels, the last token the loudest.
Tensor loud_sequences() {
  at::manual_seed(3);
  const Tensor x = at::randn({2, 9, 24}, at::kDouble);
  x.select(2, 5).mul_(30);
  x.select(2, 17).mul_(10);
  x.select(1, 8).mul_(20);
  return x;
}

TEST(RuntimeSmooth, DivisorsAreTheLargestOfTheirGroup) {
  const Tensor x = at::tensor({1.0, -6.0, 2.0, 5.0, 0.0, 3.0, 4.0, -1.0}).view({1, 2, 4});
  // Maxima 1, 6, 4, 5: in order 6 5 | 4 1.
  const Tensor window = runtime_divisors(x, {.group = 2, .span = RuntimeSmooth::Span::kWindow});
  EXPECT_TRUE(at::equal(window, at::tensor({4.0, 6.0, 4.0, 6.0}).view({1, 1, 4})));
  // The first token alone: 6 5 | 2 1.
  const Tensor causal = runtime_divisors(x, {.group = 2});
  EXPECT_TRUE(at::equal(causal, at::tensor({2.0, 6.0, 2.0, 6.0, 4.0, 6.0, 4.0, 6.0}).view({1, 2, 4})));
  const Tensor zeros = runtime_divisors(at::zeros({3, 5}), {.group = 3});
  EXPECT_TRUE(at::equal(zeros, at::ones({3, 5})));
  EXPECT_THROW(runtime_divisors(at::zeros({5}), {}), c10::Error);
  EXPECT_THROW(runtime_divisors(at::zeros({2, 5}), {.group = 0}), c10::Error);
}

TEST(RuntimeSmooth, APrefixIsRoundedTheSameOnlyWhereItIsCausal) {
  const Tensor x = loud_sequences();
  for (const RuntimeSmooth::Span span : {RuntimeSmooth::Span::kCausal, RuntimeSmooth::Span::kWindow}) {
    const QuantPoint point{.enabled = true, .runtime = RuntimeSmooth{.group = 8, .span = span}};
    const Tensor whole = point.forward(x);
    bool same = true;
    for (const int64_t length : {1, 4, 8}) {
      same = same && at::equal(point.forward(x.narrow(1, 0, length)), whole.narrow(1, 0, length));
    }
    EXPECT_EQ(same, span == RuntimeSmooth::Span::kCausal);
  }
}

TEST(RuntimeSmooth, LowersTheErrorOfLoudChannels) {
  const Tensor x = loud_sequences();
  const auto error = [&](const QuantPoint& point) { return (point.forward(x) - x).square().sum().item<double>(); };
  const double plain = error({.enabled = true});
  EXPECT_LT(error({.enabled = true, .runtime = RuntimeSmooth{.group = 1}}), plain);
  EXPECT_LT(error({.enabled = true, .runtime = RuntimeSmooth{.group = 8, .span = RuntimeSmooth::Span::kWindow}}),
            plain);
  // One group is one divisor for all: the grid of a token does not see it.
  QuantPoint point{.enabled = true, .shift = at::ones({24}, at::kDouble)};
  const Tensor expected = point.forward(x);
  point.runtime = RuntimeSmooth{.group = 24};
  EXPECT_LT((point.forward(x) - expected).abs().max().item<double>(), 1e-9);
}

}  // namespace
}  // namespace baseq
