#include "baseq/transform/transform.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../random_tensors.h"
#include "baseq/transform/hadamard.h"

namespace baseq {
namespace {

using test::invertible;
using test::random_normal;
using test::relative_error;

/// A transform that is made anew from the values that its leaves have.
struct Case {
  std::string name;
  int64_t size;
  std::vector<Tensor> leaves;
  std::function<Transform()> make;
};

/// One of each kind, of size n = k b.
std::vector<Case> factors_of(int64_t k, int64_t b, uint64_t seed) {
  const int64_t n = k * b;
  const Tensor scale = random_normal({n}, seed).abs() + 0.1, logs = random_normal({n}, seed + 1),
               order = at::randperm(n, test::generator(seed));
  const Tensor matrix = invertible({n, n}, seed + 2), matrices = invertible({k, b, b}, seed + 3);
  const Tensor left = invertible({k, k}, seed + 4), right = invertible({b, b}, seed + 5);
  const Tensor skew = random_normal({k, b, b}, seed + 6);
  return {{"scale", n, {scale}, [=] { return Transform{scale_factor(scale)}; }},
          {"logarithms", n, {logs}, [=] { return Transform{scale_factor(logs.exp(), (-logs).exp())}; }},
          {"hadamard", n, {}, [=] { return Transform{hadamard_factor(n)}; }},
          {"hadamard blocks", n, {}, [=] { return Transform{hadamard_factor(b, k)}; }},
          {"matrix", n, {matrix}, [=] { return Transform{matrix_factor(matrix)}; }},
          {"matrices", n, {matrices}, [=] { return Transform{matrix_factor(matrices)}; }},
          {"rotations", n, {skew}, [=] { return Transform{rotation_factor(cayley(skew))}; }},
          {"kronecker", n, {left, right}, [=] { return Transform{kronecker_factor(left, right)}; }},
          {"left kronecker", n, {left}, [=] { return Transform{left_kronecker_factor(left, b)}; }},
          {"permutation", n, {}, [=] { return Transform{permutation_factor(order)}; }}};
}

/// One of each kind, of random sizes, and a chain of up to six of them in random order.
std::vector<Case> random_cases(uint64_t seed) {
  std::mt19937_64 engine(seed);
  const auto pick = [&](int64_t low, int64_t high) { return low + int64_t(engine() % uint64_t(high - low + 1)); };
  std::vector<Case> cases = factors_of(pick(1, 6), pick(1, 9), seed);
  std::vector<Case> links;
  Case chain{"chain", cases[0].size, {}, {}};
  for (int64_t i = pick(2, 6); i > 0; --i) {
    links.push_back(cases[size_t(pick(0, int64_t(cases.size()) - 1))]);
    chain.name += " " + links.back().name;
    chain.leaves.insert(chain.leaves.end(), links.back().leaves.begin(), links.back().leaves.end());
  }
  chain.make = [links] {
    Transform all;
    for (const Case& link : links) all.push_back(link.make()[0]);
    return all;
  };
  cases.push_back(chain);
  cases.push_back({"hadamard of a model size", 576, {}, [] { return Transform{hadamard_factor(192, 3)}; }});
  return cases;
}

TEST(Transform, EveryKindAndChainKeepsTheOutput) {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    for (const Case& test : random_cases(1000 * seed)) {
      const Transform transform = test.make();
      const Tensor x = random_normal({2, 3, test.size}, seed + 1), w = random_normal({5, test.size}, seed + 2);
      const Tensor y = apply_transform(transform, x);
      ASSERT_EQ(y.sizes(), x.sizes()) << test.name;
      EXPECT_LE(relative_error(y.matmul(apply_inverse_transpose(transform, w).t()), x.matmul(w.t())), 1e-10)
          << test.name << ", n = " << test.size << ", seed = " << seed;
      EXPECT_LE(relative_error(y.matmul(w.t()), x.matmul(apply_transpose(transform, w).t())), 1e-10) << test.name;
      for (const Factor& factor : transform) EXPECT_EQ(factor.size(), test.size) << test.name;
    }
  }
}

TEST(Transform, IsAMatrix) {
  // What it does to the identity is T itself.
  for (const Case& test : random_cases(7)) {
    const Tensor matrix = apply_transform(test.make(), at::eye(test.size, at::kDouble));
    const Tensor x = random_normal({4, test.size}, 8);
    EXPECT_LE(relative_error(apply_transform(test.make(), x), x.matmul(matrix)), 1e-13) << test.name;
    if (test.make().size() > 1) continue;
    const Tensor identity = at::eye(test.size, at::kDouble);
    const bool orthogonal = at::allclose(matrix.matmul(matrix.t()), identity, 1e-10, 1e-10);
    EXPECT_EQ(test.make()[0].orthogonal(), orthogonal) << test.name;
  }
  const Tensor x = random_normal({4, 5}, 9);
  EXPECT_TRUE(at::equal(apply_transform({}, x), x));
  EXPECT_TRUE(at::equal(apply_inverse_transpose({}, x), x));
}

TEST(Transform, EveryKindIsItsMatrix) {
  const Tensor blocks = invertible({3, 4, 4}, 1), left = invertible({3, 3}, 2), x = random_normal({5, 12}, 3);
  const Tensor right = invertible({4, 4}, 4), scale = random_normal({12}, 5), h = hadamard_matrix(4);
  const auto expect = [&](const Factor& factor, const Tensor& matrix) {
    EXPECT_LE(relative_error(apply_transform({factor}, x), x.matmul(matrix)), 1e-14);
  };
  expect(matrix_factor(blocks), at::block_diag({blocks[0], blocks[1], blocks[2]}));
  expect(rotation_factor(h.expand({3, 4, 4})), at::block_diag({h, h, h}));
  expect(hadamard_factor(4, 3), at::block_diag({h, h, h}));
  expect(hadamard_factor(12), hadamard_matrix(12));
  expect(kronecker_factor(left, right), at::kron(left, right));
  expect(scale_factor(scale), scale.diag());
  const Tensor y = apply_transform({permutation_factor(at::tensor({2, 0, 3, 1}, at::kLong))}, at::arange(4));
  EXPECT_TRUE(at::equal(y, at::tensor({2, 0, 3, 1}, at::kLong)));
}

TEST(Transform, AppliesTheFirstFactorFirst) {
  const Factor scale = scale_factor(at::tensor({1.0, 2.0, 4.0}, at::kDouble));
  const Factor rotate = permutation_factor(at::tensor({1, 2, 0}, at::kLong));
  const Tensor y = apply_transform({scale, rotate}, at::ones({3}, at::kDouble));
  EXPECT_TRUE(at::equal(y, at::tensor({2.0, 4.0, 1.0}, at::kDouble)));
}

TEST(Transform, GradientsAreThoseOfFiniteDifferences) {
  uint64_t direction_seed = 1000;
  for (const uint64_t seed : {11, 12, 13, 14}) {
    for (const Case& test : random_cases(seed)) {
      std::vector<Tensor> variables = {random_normal({6, test.size}, 12), random_normal({3, test.size}, 13)};
      variables.insert(variables.end(), test.leaves.begin(), test.leaves.end());
      for (Tensor& variable : variables) {
        variable.set_requires_grad(true);
        variable.mutable_grad().reset();  // a chain shares its leaves with cases before it
      }
      const auto loss = [&] {
        const Transform transform = test.make();
        return apply_transform(transform, variables[0]).pow(3).sum() +
               apply_inverse_transpose(transform, variables[1]).pow(3).sum();
      };
      loss().backward();
      const at::NoGradGuard no_grad;
      const double step = 1e-6;
      for (Tensor variable : variables) {
        const Tensor direction = random_normal(variable.sizes(), ++direction_seed);
        variable.add_(direction, step);
        const double above = loss().item<double>();
        variable.add_(direction, -2 * step);
        const double below = loss().item<double>();
        variable.add_(direction, step);
        const double numeric = (above - below) / (2 * step);
        EXPECT_NEAR((variable.grad() * direction).sum().item<double>(), numeric, 1e-5 * (1 + std::abs(numeric)))
            << test.name;
      }
    }
  }
}

TEST(Transform, KeepsDtypeAndShapeOfItsArgument) {
  for (const Case& test : random_cases(17)) {
    const Transform transform = test.make();
    const Tensor x = random_normal({2, test.size}, 18).to(at::kBFloat16),
                 none = at::empty({2, 0, test.size}, at::kDouble);
    EXPECT_EQ(apply_transform(transform, x).scalar_type(), at::kBFloat16) << test.name;
    EXPECT_EQ(apply_inverse_transpose(transform, x).scalar_type(), at::kBFloat16) << test.name;
    EXPECT_EQ(apply_transpose(transform, x).scalar_type(), at::kBFloat16) << test.name;
    EXPECT_EQ(apply_transform(transform, none).sizes(), none.sizes()) << test.name;
    EXPECT_EQ(apply_transform(transform, random_normal({test.size}, 19)).sizes(), at::IntArrayRef({test.size}))
        << test.name;
  }
}

TEST(Transform, ConvertsItsTensorsButNotTheIndices) {
  for (const Case& test : factors_of(3, 4, 21)) {
    const Factor factor = test.make()[0], single = factor.to(at::TensorOptions(at::kFloat));
    for (const Tensor& part : {single.left, single.right, single.left_inverse, single.right_inverse}) {
      if (!part.defined()) continue;
      EXPECT_EQ(part.scalar_type(), factor.kind == Factor::Kind::kPermutation ? at::kLong : at::kFloat) << test.name;
    }
    const Tensor x = random_normal({2, 12}, 22);
    EXPECT_LE(relative_error(apply_transform({single}, x), apply_transform({factor}, x)), 1e-6) << test.name;
    EXPECT_EQ(single.orthogonal(), factor.orthogonal()) << test.name;
  }
}

TEST(Transform, IsCutFromTheGraph) {
  const Factor factor = scale_factor(at::ones({3}).requires_grad_(true));
  EXPECT_TRUE(factor.left.requires_grad() && factor.left_inverse.requires_grad());
  EXPECT_FALSE(factor.detach().left.requires_grad() || factor.detach().left_inverse.requires_grad());
}

TEST(Transform, RejectsAnArgumentOfAnotherSize) {
  for (const Case& test : random_cases(23)) {
    const Transform transform = test.make();
    for (const Tensor& wrong : {at::ones({2, test.size + 1}, at::kDouble), at::ones({test.size, 0}, at::kDouble),
                                at::ones({}, at::kDouble), Tensor()}) {
      EXPECT_THROW(apply_transform(transform, wrong), c10::Error) << test.name;
      EXPECT_THROW(apply_inverse_transpose(transform, wrong), c10::Error) << test.name;
    }
  }
  EXPECT_THROW(apply_transform({hadamard_factor(4), hadamard_factor(8)}, at::ones({4})), c10::Error);
}

TEST(Transform, RejectsFactorsThatAreNone) {
  const Tensor square = at::eye(3, at::kDouble), wide = at::ones({2, 3}, at::kDouble), nothing;
  for (const Tensor& scale : {nothing, wide, at::ones({}), at::empty({0}), at::ones({3}, at::kLong), at::zeros({3}),
                              at::full({3}, INFINITY), at::full({3}, NAN)}) {
    EXPECT_THROW(scale_factor(scale), c10::Error) << scale;
  }
  EXPECT_THROW(scale_factor(at::ones({3}), at::ones({4})), c10::Error);
  const int64_t huge = int64_t{1} << 62;
  const std::vector<std::pair<int64_t, int64_t>> sizes = {{0, 1}, {-4, 1}, {4, 0}, {4, -1}, {huge, 2}, {4, huge}};
  for (const auto& [block, blocks] : sizes) {
    EXPECT_THROW(hadamard_factor(block, blocks), c10::Error) << block << " x " << blocks;
  }
  for (const Tensor& matrix : {nothing, wide, at::ones({3}), at::ones({2, 2, 2, 2}), at::ones({3, 3}, at::kLong),
                               at::empty({0, 0}), at::empty({0, 3, 3}), at::ones({2, 3, 2})}) {
    EXPECT_THROW(matrix_factor(matrix), c10::Error) << matrix;
    EXPECT_THROW(rotation_factor(matrix), c10::Error) << matrix;
    EXPECT_THROW(kronecker_factor(matrix, square), c10::Error) << matrix;
    EXPECT_THROW(kronecker_factor(square, matrix), c10::Error) << matrix;
  }
  EXPECT_THROW(matrix_factor(at::zeros({3, 3})), c10::Error);
  EXPECT_THROW(matrix_factor(square, at::eye(4, at::kDouble)), c10::Error);
  EXPECT_THROW(kronecker_factor(square.unsqueeze(0), square), c10::Error);
  EXPECT_THROW(kronecker_factor(square, square, square, at::eye(2, at::kDouble)), c10::Error);
  for (const Tensor& order : {nothing, at::tensor({0, 0, 1}, at::kLong), at::tensor({0, 2}, at::kLong),
                              at::tensor({-1, 0}, at::kLong), at::tensor({0.0, 1.0}, at::kDouble),
                              at::tensor({0, 1}, at::kInt), at::empty({0}, at::kLong), at::zeros({1, 1}, at::kLong)}) {
    EXPECT_THROW(permutation_factor(order), c10::Error) << order;
  }
}

TEST(Cayley, IsOrthogonalAndStartsAtTheIdentity) {
  const Tensor rotation = cayley(random_normal({3, 7, 7}, 1));
  const Tensor identity = at::eye(7, at::kDouble);
  EXPECT_LE((rotation.matmul(rotation.mT()) - identity).abs().max().item<double>(), 1e-13);
  EXPECT_TRUE(at::equal(cayley(at::zeros({7, 7}, at::kDouble)), identity));
  EXPECT_THROW(cayley(at::ones({2, 3})), c10::Error);
  EXPECT_THROW(cayley(at::ones({3, 3}, at::kLong)), c10::Error);
}

TEST(Cayley, GradientMatchesFiniteDifferences) {
  for (const bool from_zero : {true, false}) {
    Tensor parameter = from_zero ? at::zeros({2, 5, 5}, at::kDouble) : random_normal({2, 5, 5}, 1);
    const Tensor weight = random_normal({2, 5, 5}, 2), direction = random_normal({2, 5, 5}, 3);
    parameter.set_requires_grad(true);
    (cayley(parameter) * weight).sum().backward();
    const at::NoGradGuard no_grad;
    const double step = 1e-5;
    const Tensor difference = cayley(parameter + step * direction) - cayley(parameter - step * direction);
    const double numeric = (difference * weight).sum().item<double>() / (2 * step);
    EXPECT_NEAR((parameter.grad() * direction).sum().item<double>(), numeric, 1e-8 * (1 + std::abs(numeric)));
  }
}

}  // namespace
}  // namespace baseq
