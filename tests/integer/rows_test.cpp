#include "integer/rows.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <cmath>

#include "integer/prepared_linear.h"

namespace baseq {
namespace {

/// Calls fn with every instruction set, 1 to 3 threads, all rows or one by one; all have to give the same bits.
template <class Fn>
void expect_one_result(const Tensor& x, const Fn& fn) {
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const Tensor expected = fn(int64_t{0}, x.size(0), kScalarKernels);
  for (int64_t k = 0; k < kNumIntegerKernels; ++k) {
    if (!kIntegerKernels[k]->supported()) continue;
    for (const int count : {1, 2, 3}) {
      at::set_num_threads(count);
      EXPECT_TRUE(fn(int64_t{0}, x.size(0), *kIntegerKernels[k]).equal(expected)) << kIntegerKernels[k]->name;
    }
    for (int64_t row = 0; row < x.size(0); ++row) {
      EXPECT_TRUE(fn(row, row + 1, *kIntegerKernels[k]).equal(expected.narrow(0, row, 1))) << kIntegerKernels[k]->name;
    }
  }
  at::set_num_threads(threads);
}

constexpr int64_t kFeatures[] = {1, 15, 16, 70, 576};

TEST(Rows, NormIsTheRootMeanSquareNorm) {
  at::manual_seed(1);
  for (const int64_t features : kFeatures) {
    const Tensor x = at::randn({60, features}) * 3, weight = at::randn({features});
    const Tensor wide = x.to(at::kDouble);
    const Tensor expected = wide * (wide.square().mean(-1, true) + 1e-5).rsqrt() * weight.to(at::kDouble);
    const Tensor y = rms_norm_rows(x, weight, 1e-5, integer_kernels());
    EXPECT_LT(((y.to(at::kDouble) - expected).abs() / (expected.abs() + 1e-6)).max().item<double>(), 5e-7) << features;
    expect_one_result(x, [&](int64_t begin, int64_t end, const IntegerKernels& kernels) {
      return rms_norm_rows(x.slice(0, begin, end), weight, 1e-5, kernels);
    });
  }
}

TEST(Rows, SiluProductIsExactToARoundingOrTwo) {
  at::manual_seed(2);
  for (const int64_t features : kFeatures) {
    const Tensor gate = at::randn({40, features}) * 8, up = at::randn({40, features}), factor = at::randn({features});
    const Tensor wide = gate.to(at::kDouble);
    const Tensor expected = wide / (1 + (-wide).exp()) * up.to(at::kDouble) * factor.to(at::kDouble);
    const Tensor y = silu_product_rows(gate, up, factor, integer_kernels());
    EXPECT_LT(((y.to(at::kDouble) - expected).abs() / (expected.abs() + 1e-30)).max().item<double>(), 1e-6);
    const Tensor plain = silu_product_rows(gate, up, {}, integer_kernels());
    EXPECT_LT((plain - at::silu(gate) * up).abs().max().item<double>(), 1e-5);
    expect_one_result(gate, [&](int64_t begin, int64_t end, const IntegerKernels& kernels) {
      return silu_product_rows(gate.slice(0, begin, end), up.slice(0, begin, end), factor, kernels);
    });
  }
  const Tensor far = at::tensor({-200.0F, 200.0F, NAN});
  const Tensor y = silu_product_rows(far, at::ones({3}), {}, integer_kernels());
  EXPECT_NEAR(y[0].item<float>(), 0, 1e-30);
  EXPECT_EQ(y[1].item<float>(), 200);
  EXPECT_TRUE(std::isnan(y[2].item<float>()));
}

TEST(Rows, RopeIsWhatAtenComputes) {
  at::manual_seed(3);
  for (const int64_t head_dim : {4, 40, 64, 128}) {
    for (const int64_t half : {head_dim / 2, head_dim / 4}) {
      const Tensor x = at::randn({30, 3, head_dim}), angles = at::randn({30, half}) * 10;
      const Tensor cos = angles.cos(), sin = angles.sin();
      const Tensor a = x.narrow(2, 0, half), b = x.narrow(2, half, half);
      const Tensor c = cos.unsqueeze(1), s = sin.unsqueeze(1);
      const Tensor expected = at::cat({a * c - b * s, b * c + a * s, x.slice(2, 2 * half)}, -1);
      Tensor y = x.clone();
      rope_rows(y, cos, sin, integer_kernels());
      EXPECT_TRUE(y.equal(expected)) << head_dim << " " << half;
      expect_one_result(x, [&](int64_t begin, int64_t end, const IntegerKernels& kernels) {
        Tensor part = x.slice(0, begin, end).clone();
        rope_rows(part, cos.slice(0, begin, end), sin.slice(0, begin, end), kernels);
        return part;
      });
    }
  }
}

TEST(Rows, CanBeColumnsOfAWiderMatrix) {
  at::manual_seed(4);
  const IntegerKernels& kernels = integer_kernels();
  const Tensor wide = at::randn({2, 7, 100}), weight = at::randn({40});
  const Tensor first = wide.narrow(2, 3, 40), second = wide.narrow(2, 57, 40), turned = wide.transpose(0, 1);
  const Tensor a = first.contiguous(), b = second.contiguous();
  EXPECT_TRUE(rms_norm_rows(first, weight, 1e-5, kernels).equal(rms_norm_rows(a, weight, 1e-5, kernels)));
  EXPECT_TRUE(silu_product_rows(first, second, {}, kernels).equal(silu_product_rows(a, b, {}, kernels)));
  EXPECT_TRUE(sum_of_rows(first, second).equal(a + b));
  EXPECT_TRUE(sum_of_rows(turned, turned).equal(turned + turned));
  EXPECT_TRUE(gain_and_shift_rows(first, weight, weight).equal(a * weight - weight));
  const Tensor heads = wide.view({14, 100}).narrow(1, 10, 80).view({14, 2, 40});
  const Tensor cos = at::randn({14, 60}).narrow(1, 0, 20), sin = at::randn({14, 60}).narrow(1, 20, 20);
  Tensor expected = heads.clone(), y = heads;
  rope_rows(expected, cos.contiguous(), sin.contiguous(), kernels);
  rope_rows(y, cos, sin, kernels);
  EXPECT_TRUE(y.equal(expected));
}

TEST(Rows, GainAndShiftAreRoundedOneByOne) {
  at::manual_seed(5);
  const Tensor x = at::randn({9, 70}), gain = at::randn({70}), shift = at::randn({70});
  EXPECT_TRUE(gain_and_shift_rows(x, gain, shift).equal(x * gain - shift));
  EXPECT_TRUE(gain_and_shift_rows(x, gain, {}).equal(x * gain));
  EXPECT_TRUE(gain_and_shift_rows(x, {}, shift).equal(x - shift));
  EXPECT_TRUE(gain_and_shift_rows(x, {}, {}).is_same(x));
}

TEST(Rows, RefuseWhatDoesNotFit) {
  Tensor x = at::randn({2, 2, 8});
  const Tensor angles = at::randn({2, 4}), wide = at::randn({2, 5});
  const IntegerKernels& kernels = integer_kernels();
  EXPECT_THROW(rope_rows(x, wide, wide, kernels), c10::Error);
  EXPECT_THROW(rope_rows(x, angles, wide, kernels), c10::Error);
  EXPECT_THROW(rms_norm_rows(x, at::ones({7}), 1e-5, kernels), c10::Error);
  EXPECT_THROW(rms_norm_rows(x.to(at::kDouble), at::ones({8}), 1e-5, kernels), c10::Error);
  EXPECT_THROW(silu_product_rows(x, angles, {}, kernels), c10::Error);
}

}  // namespace
}  // namespace baseq
