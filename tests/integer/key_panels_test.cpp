#include "integer/key_panels.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "integer/prepared_linear.h"

namespace baseq {
namespace {

QuantSpec cache_grid(int64_t num_bits, bool symmetric) {
  return {.num_bits = num_bits, .symmetric = symmetric, .strategy = Strategy::kToken, .dynamic = true};
}

/// float64 [rows, features]: what the codes stand for, without rounding.
Tensor exact_values(const Activations& x) {
  Tensor codes = x.codes.select(1, 0).to(at::kDouble);
  if (x.planes() == 2) codes = codes * 128 + x.codes.select(1, 1).to(at::kDouble);
  Tensor values = codes.narrow(1, 0, x.columns.features) * x.scale.to(at::kDouble);
  return x.base.defined() ? values + x.base.to(at::kDouble).unsqueeze(1) : values;
}

TEST(KeyPanels, ScoresAreTheProductsWithTheCodes) {
  at::manual_seed(1);
  for (const int64_t bits : {2, 3, 4, 6, 8}) {
    for (const bool symmetric : {true, false}) {
      for (const int64_t head_dim : {64, 80, 128}) {
        KeyPanels panels(head_dim, cache_grid(bits, symmetric), 100);
        const Tensor keys = at::randn({85, head_dim}) + 0.3;
        panels.append(keys, 0.95);
        const Activations stored = quantize_rows(keys, panels.columns(), cache_grid(bits, symmetric), 0.95);
        const Activations queries = fixed_point_rows(at::randn({9, head_dim}), panels.columns(), 15);
        const Tensor scores = panels.scores(queries, integer_kernels());
        ASSERT_EQ(scores.sizes(), at::IntArrayRef({9, 85}));
        const Tensor q = exact_values(queries), k = exact_values(stored);
        const Tensor base = stored.base.defined() ? stored.base.to(at::kDouble) : at::zeros({85}, at::kDouble);
        const Tensor size = (k - base.unsqueeze(1)).abs() + base.abs().unsqueeze(1);
        const Tensor magnitude = at::linear(q.abs(), size).to(at::kFloat);
        const Tensor ulp = (at::nextafter(magnitude, at::full_like(magnitude, INFINITY)) - magnitude).to(at::kDouble);
        const Tensor error = (scores.to(at::kDouble) - at::linear(q, k)).abs() / ulp;
        ASSERT_LE(error.max().item<double>(), 4) << bits << " bits, " << symmetric << ", " << head_dim;
      }
    }
  }
}

TEST(KeyPanels, ScoresAreTheSameBitsHoweverKeysArrive) {
  at::manual_seed(2);
  for (const int64_t bits : {4, 8}) {
    for (const bool symmetric : {true, false}) {
      const Tensor keys = at::randn({50, 96}), x = at::randn({11, 96});
      KeyPanels at_once(96, cache_grid(bits, symmetric), 64), one_by_one(96, cache_grid(bits, symmetric), 64);
      at_once.append(keys);
      const Activations queries = fixed_point_rows(x, at_once.columns(), 15);
      const Tensor expected = at_once.scores(queries, kScalarKernels);
      for (int64_t k = 0; k < kNumIntegerKernels; ++k) {
        if (!kIntegerKernels[k]->supported()) continue;
        EXPECT_TRUE(at_once.scores(queries, *kIntegerKernels[k]).equal(expected)) << kIntegerKernels[k]->name;
        for (int64_t row = 0; row < 11; ++row) {
          const Activations one = fixed_point_rows(x.narrow(0, row, 1), at_once.columns(), 15);
          EXPECT_TRUE(at_once.scores(one, *kIntegerKernels[k]).equal(expected.narrow(0, row, 1)));
        }
      }
      for (int64_t token = 0; token < 50; ++token) {
        one_by_one.append(keys.narrow(0, token, 1));
        ASSERT_EQ(one_by_one.length(), token + 1);
        if (token % 7 != 0) continue;
        EXPECT_TRUE(one_by_one.scores(queries, integer_kernels()).equal(expected.narrow(1, 0, token + 1)));
      }
      EXPECT_TRUE(one_by_one.scores(queries, integer_kernels()).equal(expected));
    }
  }
}

TEST(KeyPanels, RefuseMoreTokensThanTheyHold) {
  KeyPanels panels(64, cache_grid(4, false), 3);
  panels.append(at::randn({2, 64}));
  EXPECT_THROW(panels.append(at::randn({2, 64})), c10::Error);
  EXPECT_THROW(panels.append(at::randn({1, 32})), c10::Error);
  EXPECT_EQ(panels.length(), 2);
  EXPECT_THROW(panels.scores(fixed_point_rows(at::randn({1, 32}), {32, 32}, 15), integer_kernels()), c10::Error);
  EXPECT_THROW(KeyPanels(64, {.num_bits = 4}, 3), c10::Error);
}

}  // namespace
}  // namespace baseq
