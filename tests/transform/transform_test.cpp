#include "baseq/transform/transform.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "baseq/transform/hadamard.h"

namespace baseq {
namespace {

at::Generator generator(uint64_t seed) { return at::make_generator<at::CPUGeneratorImpl>(seed); }

Tensor random(at::IntArrayRef sizes, uint64_t seed) { return at::randn(sizes, generator(seed), at::kDouble); }

/// Well conditioned: a perturbed identity.
Tensor random_invertible(at::IntArrayRef sizes, uint64_t seed) {
  return at::eye(sizes.back(), at::kDouble) + random(sizes, seed) * (0.3 / std::sqrt(double(sizes.back())));
}

double relative_error(const Tensor& got, const Tensor& expected) {
  return ((got - expected).norm() / expected.norm()).item<double>();
}

using NamedTransform = std::pair<std::string, std::shared_ptr<Transform>>;

/// One of each class, of random shapes.
std::vector<NamedTransform> random_transforms(uint64_t seed) {
  std::mt19937_64 engine(seed);
  const auto pick = [&](int64_t low, int64_t high) { return low + int64_t(engine() % uint64_t(high - low + 1)); };
  const int64_t n = pick(1, 40), a = pick(1, 9), b = pick(1, 9), k = pick(1, 5);
  const auto scale = std::make_shared<ScaleTransform>(random({n}, seed).abs() + 0.1);
  const auto rotation = std::make_shared<OrthogonalTransform>(random({n, n}, seed + 1));
  const auto permutation = std::make_shared<PermutationTransform>(at::randperm(n, generator(seed)));
  const auto hadamard = std::make_shared<HadamardTransform>(n);
  return {{"scale", scale},
          {"hadamard of any size", hadamard},
          {"hadamard of a model size", std::make_shared<HadamardTransform>(pick(1, 3) * 192)},
          {"orthogonal", rotation},
          {"orthogonal blocks", std::make_shared<OrthogonalTransform>(random({k, b, b}, seed + 2))},
          {"kronecker", std::make_shared<KroneckerTransform>(random_invertible({a, a}, seed + 3),
                                                             random_invertible({b, b}, seed + 4))},
          {"block diagonal", std::make_shared<BlockDiagonalTransform>(random_invertible({k, b, b}, seed + 5))},
          {"permutation", permutation},
          {"composed", std::make_shared<ComposedTransform>(std::vector<std::shared_ptr<const Transform>>{
                           permutation, scale, hadamard, rotation, scale})}};
}

TEST(Transform, EveryTransformKeepsTheOutput) {
  for (uint64_t seed = 0; seed < 40; ++seed) {
    for (const auto& [name, transform] : random_transforms(1000 * seed)) {
      const int64_t n = transform->size();
      const Tensor x = random({2, 3, n}, seed + 1);
      const Tensor w = random({5, n}, seed + 2);
      const Tensor expected = x.matmul(w.t());
      const Tensor got = transform->apply(x).matmul(transform->apply_inverse_transpose(w).t());
      ASSERT_EQ(transform->apply(x).sizes(), x.sizes()) << name;
      EXPECT_LE(relative_error(got, expected), 1e-10) << name << ", n = " << n << ", seed = " << seed;
    }
  }
}

TEST(Transform, EveryTransformIsLinearInTheRows) {
  // What `apply` does to the identity is T itself, so applying it to x must be the product x T.
  for (const auto& [name, transform] : random_transforms(7)) {
    const Tensor identity = at::eye(transform->size(), at::kDouble);
    const Tensor x = random({4, transform->size()}, 8);
    EXPECT_LE(relative_error(transform->apply(x), x.matmul(transform->apply(identity))), 1e-13) << name;
  }
}

TEST(Transform, EveryTransformRejectsAWrongSize) {
  for (const auto& [name, transform] : random_transforms(9)) {
    const Tensor wrong = at::ones({2, transform->size() + 1}, at::kDouble);
    EXPECT_THROW(transform->apply(wrong), c10::Error) << name;
    EXPECT_THROW(transform->apply_inverse_transpose(wrong), c10::Error) << name;
  }
}

TEST(Transform, GradientsReachEveryParameter) {
  for (const auto& [name, transform] : random_transforms(11)) {
    for (Tensor parameter : transform->parameters()) {
      parameter.set_requires_grad(true);
      parameter.mutable_grad().reset();  // the composition shares its parameters with transforms before it
    }
    const Tensor x = random({6, transform->size()}, 12);
    const Tensor w = random({3, transform->size()}, 13);
    const auto loss = [&, t = transform] {
      return t->apply(x).pow(3).sum() + t->apply_inverse_transpose(w).pow(3).sum();
    };
    if (transform->parameters().empty()) continue;
    loss().backward();
    const double step = 1e-6;
    uint64_t seed = 14;
    for (Tensor parameter : transform->parameters()) {
      const Tensor gradient = parameter.grad().clone();
      const at::NoGradGuard no_grad;
      const Tensor direction = random(parameter.sizes(), ++seed);
      parameter.add_(direction, step);
      const double above = loss().item<double>();
      parameter.add_(direction, -2 * step);
      const double below = loss().item<double>();
      parameter.add_(direction, step);
      const double numeric = (above - below) / (2 * step);
      // A parameter that a composition holds twice has both contributions in its gradient, and in the difference.
      EXPECT_NEAR((gradient * direction).sum().item<double>(), numeric, 1e-5 * (1 + std::abs(numeric))) << name;
    }
  }
}

TEST(Transform, KeepsTheDtypeOfItsArgument) {
  for (const auto& [name, transform] : random_transforms(17)) {
    const Tensor x = random({2, transform->size()}, 18).to(at::kBFloat16);
    EXPECT_EQ(transform->apply(x).scalar_type(), at::kBFloat16) << name;
    EXPECT_EQ(transform->apply_inverse_transpose(x).scalar_type(), at::kBFloat16) << name;
  }
}

TEST(Transform, AcceptsAnEmptyBatch) {
  for (const auto& [name, transform] : random_transforms(19)) {
    const Tensor x = at::empty({2, 0, transform->size()}, at::kDouble);
    EXPECT_EQ(transform->apply(x).sizes(), x.sizes()) << name;
  }
}

TEST(KroneckerTransform, IsTheKroneckerProduct) {
  const Tensor left = random_invertible({3, 3}, 1), right = random_invertible({5, 5}, 2), x = random({4, 15}, 3);
  const Tensor expected = x.matmul(at::kron(left, right));
  EXPECT_LE(relative_error(KroneckerTransform(left, right).apply(x), expected), 1e-14);
}

TEST(BlockDiagonalTransform, IsTheBlockDiagonalMatrix) {
  const Tensor matrices = random_invertible({3, 4, 4}, 1), x = random({5, 12}, 2);
  const Tensor expected = x.matmul(at::block_diag({matrices[0], matrices[1], matrices[2]}));
  EXPECT_LE(relative_error(BlockDiagonalTransform(matrices).apply(x), expected), 1e-14);
}

TEST(PermutationTransform, GathersAndRejectsWhatIsNoPermutation) {
  const Tensor x = at::arange(4, at::kDouble);
  const Tensor y = PermutationTransform(at::tensor({2, 0, 3, 1}, at::kLong)).apply(x);
  EXPECT_TRUE(at::equal(y, at::tensor({2.0, 0.0, 3.0, 1.0}, at::kDouble)));
  EXPECT_THROW(PermutationTransform(at::tensor({0, 0, 1}, at::kLong)), c10::Error);
  EXPECT_THROW(PermutationTransform(at::tensor({0.0, 1.0}, at::kDouble)), c10::Error);
}

TEST(ComposedTransform, AppliesTheFirstTransformFirst) {
  const auto scale = std::make_shared<ScaleTransform>(at::tensor({1.0, 2.0, 4.0}, at::kDouble));
  const auto rotate = std::make_shared<PermutationTransform>(at::tensor({1, 2, 0}, at::kLong));
  const Tensor y = ComposedTransform({scale, rotate}).apply(at::ones({3}, at::kDouble));
  EXPECT_TRUE(at::equal(y, at::tensor({2.0, 4.0, 1.0}, at::kDouble)));
  EXPECT_THROW(ComposedTransform({}), c10::Error);
  EXPECT_THROW(ComposedTransform({scale, std::make_shared<HadamardTransform>(4)}), c10::Error);
}

TEST(Cayley, IsOrthogonalAndStartsAtTheIdentity) {
  const Tensor rotation = cayley(random({3, 7, 7}, 1));
  const Tensor identity = at::eye(7, at::kDouble);
  EXPECT_LE((rotation.matmul(rotation.mT()) - identity).abs().max().item<double>(), 1e-13);
  EXPECT_TRUE(at::equal(cayley(at::zeros({7, 7}, at::kDouble)), identity));
  EXPECT_THROW(cayley(at::ones({2, 3})), c10::Error);
  EXPECT_THROW(cayley(at::ones({3, 3}, at::kLong)), c10::Error);
}

TEST(Cayley, GradientMatchesFiniteDifferences) {
  for (const bool from_zero : {true, false}) {
    Tensor parameter = from_zero ? at::zeros({2, 5, 5}, at::kDouble) : random({2, 5, 5}, 1);
    const Tensor weight = random({2, 5, 5}, 2), direction = random({2, 5, 5}, 3);
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
