#include "model/exact_transform.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "../random_tensors.h"

namespace baseq {
namespace {

Tensor matrix(int64_t count, int64_t size, uint64_t seed) {
  return at::eye(size, at::kDouble) + 0.3 * test::random_normal({count, size, size}, seed) / std::sqrt(double(size));
}

struct Chain {
  const char* name;
  Transform transform;
};
/// Chains of 24 features.
std::vector<Chain> chains() {
  const Factor scale = scale_factor(1 + 0.5 * test::random_normal({24}, 1).abs());
  const Factor blocks = matrix_factor(matrix(3, 8, 2)), whole = matrix_factor(matrix(1, 24, 3));
  const Factor kronecker = kronecker_factor(matrix(1, 4, 4)[0], matrix(1, 6, 5)[0]);
  const Factor permutation = permutation_factor(at::arange(23, -1, -1, at::kLong));
  return {{"none", {}},
          {"scale", {scale}},
          {"hadamard", {hadamard_factor(24)}},
          {"small hadamards", {hadamard_factor(8, 3)}},
          {"blocks", {blocks}},
          {"matrix", {whole}},
          {"kronecker", {kronecker}},
          {"left kronecker", {left_kronecker_factor(matrix(1, 4, 4)[0], 6)}},
          {"permutation", {permutation}},
          {"chain", {scale, blocks, permutation, kronecker, hadamard_factor(24)}}};
}

Transform in_float(const Transform& transform) {
  Transform result;
  for (const Factor& factor : transform) result.push_back(factor.to(at::TensorOptions().dtype(at::kFloat)));
  return result;
}

TEST(ExactTransform, IsTheTransformAndItsInverseTranspose) {
  const Tensor x = test::random_normal({2, 5, 24}, 9);
  for (const auto& [name, transform] : chains()) {
    const Transform single = in_float(transform);
    const Tensor y = exact_transform(single, x.to(at::kFloat));
    EXPECT_EQ(y.sizes(), x.sizes()) << name;
    EXPECT_LT(test::relative_error(y, apply_transform(transform, x)), 1e-6) << name;
    const Tensor back = exact_transform(single, x.to(at::kFloat), /*inverse_transpose=*/true);
    EXPECT_LT(test::relative_error(back, apply_inverse_transpose(transform, x)), 1e-6) << name;
  }
}

TEST(ExactTransform, ARowIsTheSameBitsAloneAndWithAnyThreads) {
  const Tensor x = test::random_normal({37, 24}, 9, at::kFloat);
  const int threads = at::get_num_threads();
  for (const auto& [name, transform] : chains()) {
    const Transform single = in_float(transform);
    const Tensor expected = exact_transform(single, x);
    for (const int count : {1, 2}) {
      at::set_num_threads(count);
      EXPECT_TRUE(at::equal(exact_transform(single, x), expected)) << name;
      EXPECT_TRUE(at::equal(exact_transform(single, x.narrow(0, 20, 1)), expected.narrow(0, 20, 1))) << name;
    }
  }
  at::set_num_threads(threads);
}

}  // namespace
}  // namespace baseq
