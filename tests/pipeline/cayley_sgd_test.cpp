#include "pipeline/cayley_sgd.h"

#include <gtest/gtest.h>

#include "../random_tensors.h"

namespace baseq {
namespace {

/// Three random orthogonal matrices.
Tensor random_orthogonal(int64_t n, uint64_t seed) {
  return std::get<0>(at::linalg_qr(test::random_normal({3, n, n}, seed)));
}

double distance_from_orthogonal(const Tensor& matrix) {
  const Tensor eye = at::eye(matrix.size(-1), matrix.options());
  return (at::matmul(matrix, matrix.mT()) - eye).abs().max().item<double>();
}

TEST(CayleySgd, MatricesStayOrthogonal) {
  Tensor matrix = random_orthogonal(24, 1).to(at::kFloat);
  for (uint64_t step = 0; step < 100; ++step) {
    cayley_step(matrix, test::random_normal(matrix.sizes(), 10 + step, at::kFloat), 1.5);
  }
  EXPECT_LT(distance_from_orthogonal(matrix), 2e-3);
  const Tensor nearest = nearest_orthogonal(matrix);
  EXPECT_LT(distance_from_orthogonal(nearest), 1e-12);
  EXPECT_LT(test::relative_error(nearest, matrix), 2e-3);
}

/// A small step goes along the gradient that is projected onto the tangents, R skew(R^T G): the loss falls as it says.
TEST(CayleySgd, ASmallStepFollowsTheProjectedGradient) {
  const Tensor start = random_orthogonal(8, 2), target = test::random_normal(start.sizes(), 3);
  const auto loss = [&](const Tensor& matrix) { return (matrix * target).sum().item<double>(); };
  constexpr double kRate = 1e-6;
  Tensor matrix = start.clone();
  cayley_step(matrix, target, kRate);
  const Tensor along = (matrix - start) / kRate;
  // On the manifold to first order: R^T dR is skew.
  const Tensor generator = at::matmul(start.mT(), along);
  EXPECT_LT((generator + generator.mT()).abs().max().item<double>(), 1e-4);
  EXPECT_NEAR((loss(matrix) - loss(start)) / kRate, (along * target).sum().item<double>(), 1e-4);
  EXPECT_LT(loss(matrix), loss(start));
}

/// The nearest rotation of a Procrustes problem is found.
TEST(CayleySgd, FindsTheNearestRotation) {
  const Tensor wanted = nearest_orthogonal(at::eye(6, at::kDouble) + 0.2 * test::random_normal({1, 6, 6}, 5));
  Tensor matrix = at::eye(6, at::kDouble).unsqueeze(0).clone();
  for (int step = 0; step < 300; ++step) cayley_step(matrix, matrix - wanted, 0.3);
  EXPECT_LT(test::relative_error(matrix, wanted), 1e-6);
}

TEST(CayleySgd, NoGradientLeavesTheMatrixAlone) {
  const Tensor start = random_orthogonal(5, 6);
  Tensor matrix = start.clone();
  cayley_step(matrix, at::zeros_like(matrix), 1.5);
  EXPECT_LT(test::relative_error(matrix, start), 1e-14);
}

}  // namespace
}  // namespace baseq
