#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "../random_tensors.h"
#include "baseq/transform/hadamard.h"
#include "kernels/fake_quantize.h"
#include "kernels/gptq.h"
#include "kernels/hadamard.h"
#include "quant/fused.h"
#include "quant/gptq_block.h"
#include "quant/grid.h"
#include "transform/hadamard_construction.h"
#include "transform/hadamard_kernel.h"

// The kernels of a GPU, run by a block of threads on the host, against the CPU's own.

namespace baseq {
namespace {

using test::random_normal;

using Block = kernels::HostBlock<64>;

/// With AVX-512 the CPU's kernels round a product and a sum once, as a GPU does; with less they round twice.
bool cpu_fuses() { return __builtin_cpu_supports("avx512f") != 0; }

void expect_same(const Tensor& got, const Tensor& expected, const char* what) {
  if (cpu_fuses()) {
    EXPECT_TRUE(at::equal(got, expected)) << what << " differ by " << (got - expected).abs().max().item<double>();
  } else {
    EXPECT_LT(test::relative_error(got, expected), 1e-6) << what;
  }
}

kernels::RangeRule rule_of(const QuantSpec& spec) {
  using kernels::ScaleType;
  const ScaleType type = spec.scale_dtype == at::kHalf       ? ScaleType::kHalf
                         : spec.scale_dtype == at::kBFloat16 ? ScaleType::kBFloat16
                                                             : ScaleType::kFloat;
  return {.num_steps = static_cast<float>(num_steps(spec)),
          .low_code = static_cast<float>(code_min(spec)),
          .high_code = static_cast<float>(code_max(spec)),
          .smallest_scale = static_cast<float>(smallest_scale(spec)),
          .symmetric = spec.symmetric,
          .scale_type = type};
}

float* data(const Tensor& t) { return t.defined() ? t.mutable_data_ptr<float>() : nullptr; }

/// Rows of one group each with everything that a quant point may have.
struct Points {
  Tensor x, clip, gain, shift, out_grad;
  QuantSpec spec;
  bool add_shift_back = false;

  kernels::Group group(int64_t row) const {
    return {.x = data(x) + row * x.size(1),
            .gain = data(gain),
            .shift = data(shift),
            .clip = clip.defined() ? data(clip)[0] : 1.0F,
            .size = x.size(1)};
  }
};

std::vector<Points> some_points() {
  std::vector<Points> all;
  uint64_t seed = 1;
  // Fewer than four elements beyond whole runs of sixteen: for more, the compiler of the CPU's kernels takes shorter
  // vectors, which round twice.
  for (const int64_t size : {3, 16, 50, 576, 1024, 1506, 4099}) {
    for (const bool symmetric : {false, true}) {
      for (const bool corrected : {false, true}) {
        Points points{.x = random_normal({5, size}, seed, at::kFloat),
                      .out_grad = random_normal({5, size}, seed + 1, at::kFloat)};
        points.spec = {.num_bits = 2 + static_cast<int64_t>(seed % 7), .symmetric = symmetric, .dynamic = true};
        if (seed % 3 == 0) points.spec.scale_dtype = at::kBFloat16;
        if (corrected) {
          points.clip = at::full({1, 1}, 0.9, at::kFloat);
          points.gain = (1 + 0.1 * random_normal({size}, seed + 2)).to(at::kFloat);
          points.shift = random_normal({size}, seed + 3, at::kFloat);
          points.add_shift_back = seed % 2 == 0;
        }
        points.x[1].fill_(0.5);  // no range at all
        all.push_back(points);
        seed += 5;
      }
    }
  }
  return all;
}

TEST(HostBlock, FakeQuantizesAsTheCpuDoes) {
  for (const Points& points : some_points()) {
    SCOPED_TRACE(c10::str(points.x.sizes(), " ", points.spec.num_bits, " bits, symmetric ", points.spec.symmetric));
    const Tensor expected = fused_fake_quantize_dynamic(points.x.unsqueeze(1), points.spec, points.clip, points.gain,
                                                        points.shift, points.add_shift_back);
    const Tensor got = at::empty_like(points.x);
    std::vector<kernels::Extreme> shared(Block::kThreads);
    for (int64_t row = 0; row < points.x.size(0); ++row) {
      kernels::fake_quantize_group(Block(), points.group(row), rule_of(points.spec), points.add_shift_back,
                                   data(got) + row * points.x.size(1), shared.data());
    }
    expect_same(got, expected.squeeze(1), "values");
  }
}

TEST(HostBlock, TakesGradientsAsTheCpuDoes) {
  for (const Points& points : some_points()) {
    SCOPED_TRACE(c10::str(points.x.sizes(), " ", points.spec.num_bits, " bits, symmetric ", points.spec.symmetric));
    const auto leaf = [](const Tensor& t) { return t.defined() ? t.clone().requires_grad_(true) : t; };
    Points leaves = points;
    for (Tensor* t : {&leaves.x, &leaves.clip, &leaves.gain, &leaves.shift}) *t = leaf(*t);
    fused_fake_quantize_dynamic(leaves.x.unsqueeze(1), points.spec, leaves.clip, leaves.gain, leaves.shift,
                                points.add_shift_back)
        .backward(points.out_grad.unsqueeze(1));
    const int64_t rows = points.x.size(0), size = points.x.size(1), chains = kernels::num_chains(size);
    const Tensor x_grad = at::empty_like(points.x);
    // Of each row, which is a chunk of its own here as on the CPU, and then of all.
    const Tensor gain_grad = at::zeros({rows, size}), shift_grad = at::zeros({rows, size});
    std::vector<double> clip_grad(static_cast<size_t>(rows));
    std::vector<kernels::Extreme> shared(Block::kThreads);
    std::vector<float> sums(static_cast<size_t>(2 * chains + 2 * kernels::kLanes));
    float* tails = sums.data() + 2 * chains;
    for (int64_t row = 0; row < rows; ++row) {
      const kernels::GroupGradients gradients{.x = data(x_grad) + row * size,
                                              .gain = data(gain_grad) + row * size,
                                              .shift = data(shift_grad) + row * size,
                                              .clip = &clip_grad[static_cast<size_t>(row)]};
      kernels::fake_quantize_group_backward(Block(), points.group(row), data(points.out_grad) + row * size,
                                            rule_of(points.spec), points.add_shift_back, gradients, shared.data(),
                                            {sums.data(), sums.data() + chains, tails, tails + kernels::kLanes});
    }
    expect_same(x_grad, leaves.x.grad(), "gradients of x");
    if (!points.gain.defined()) continue;
    expect_same(gain_grad.sum(0), leaves.gain.grad(), "gradients of the gain");
    expect_same(shift_grad.sum(0), leaves.shift.grad(), "gradients of the shift");
    const Tensor clip = at::tensor(clip_grad, at::kDouble).sum().to(at::kFloat);
    expect_same(clip, leaves.clip.grad().squeeze(), "gradients of the clip");
  }
}

/// The plan of a size and the codes that it points to.
struct OwnedPlan {
  kernels::HadamardPlan plan;
  std::vector<SignFactor> factors;

  OwnedPlan(int64_t size, bool transpose) {
    std::vector<int64_t> orders = hadamard_factors(size);
    plan.power_of_two = static_cast<int>(orders.back());
    orders.pop_back();
    for (const int64_t order : orders) {
      const SignMatrix h = hadamard_signs(order);
      factors.emplace_back(transpose ? SignMatrix(h.transpose()) : h);
    }
    for (const SignFactor& factor : factors) {
      plan.factors[plan.num_factors++] = {static_cast<int>(factor.order), factor.codes.data()};
    }
    plan.size = static_cast<int>(size);
    plan.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(size)));
  }
};

TEST(HostBlock, TurnsRowsAsTheCpuDoes) {
  for (const int64_t size : {1, 2, 8, 64, 128, 12, 20, 28, 36, 40, 96, 172, 344, 576, 1536, 11008, 14336}) {
    for (const bool transpose : {false, true}) {
      SCOPED_TRACE(size);
      const Tensor x = random_normal({3, size}, static_cast<uint64_t>(size), at::kFloat);
      const OwnedPlan owned(size, transpose);
      ASSERT_LE(owned.factors.size(), 2U);
      Tensor got = x.clone();
      std::vector<float> other(static_cast<size_t>(size));
      for (int64_t row = 0; row < 3; ++row) {
        kernels::hadamard_row(Block(), owned.plan, data(got) + row * size, other.data());
      }
      EXPECT_TRUE(at::equal(got, hadamard_transform(x, transpose)));
    }
  }
}

TEST(HostBlock, RoundsColumnsAsTheCpuDoes) {
  const int64_t width = 70, rows = 2 * kRowsInStrip, groups = 3;
  for (const bool symmetric : {true, false}) {
    GptqBlock block{.target = random_normal({width, rows}, 1, at::kFloat),
                    .feedback = random_normal({width, width}, 3, at::kFloat).mul_(0.1),
                    .codes = at::empty({width, rows}, at::kChar),
                    .qparams = {.scale = random_normal({groups, rows}, 4, at::kFloat).abs_().mul_(0.1).add_(0.1)},
                    .groups = at::arange(width).floor_divide(30),
                    .pivots = random_normal({width}, 5, at::kFloat).abs_(),
                    .added = random_normal({width}, 6, at::kFloat).abs_(),
                    .low = -8,
                    .high = 7};
    block.corrected = block.target + random_normal({width, rows}, 2, at::kFloat).mul_(0.01);
    if (!symmetric) block.qparams.zero_point = at::randint(-3, 4, {groups, rows}, test::generator(7)).to(at::kFloat);
    const Tensor target = block.target.clone(), codes = at::empty_like(block.codes);
    const Tensor losses = at::zeros({rows / kRowsInStrip}, at::kDouble), loss = losses.clone();
    round_block(block, losses);
    std::vector<float> errors(static_cast<size_t>(width * Block::kThreads)), shares(static_cast<size_t>(width));
    for (int64_t top = 0; top < rows; top += kRowsInStrip) {
      const kernels::GptqColumns columns{.target = data(target) + top,
                                         .corrected = data(block.corrected) + top,
                                         .feedback = data(block.feedback),
                                         .scale = data(block.qparams.scale) + top,
                                         .zero_point = symmetric ? nullptr : data(block.qparams.zero_point) + top,
                                         .codes = codes.mutable_data_ptr<int8_t>() + top,
                                         .pivots = data(block.pivots),
                                         .added = data(block.added),
                                         .groups = block.groups.const_data_ptr<int64_t>(),
                                         .width = width,
                                         .stride = rows,
                                         .feedback_stride = width,
                                         .low = block.low,
                                         .high = block.high};
      Block::PerThread<float> found;
      kernels::round_columns(Block(), columns, errors.data(), shares.data(), found);
      for (const float of_row : found) loss.mutable_data_ptr<double>()[top / kRowsInStrip] += of_row;
    }
    EXPECT_TRUE(at::equal(codes, block.codes));
    expect_same(target, block.target, "errors");
    EXPECT_LT(test::relative_error(loss, losses), 1e-5);
  }
}

}  // namespace
}  // namespace baseq
