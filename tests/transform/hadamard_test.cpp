#include "baseq/transform/hadamard.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "../random_tensors.h"
#include "transform/hadamard_construction.h"
#include "transform/hadamard_ops.h"

namespace baseq {
namespace {

// Hidden and feed-forward sizes of published models, head dimensions, powers of two.
constexpr int64_t kModelSizes[] = {576,   1536,  896,   4864,  3584, 18944, 8960, 5120, 13824, 11008, 14336, 27648,
                                   28672, 29568, 25600, 17408, 9728, 64,    80,   96,   128,   256,   512,   1024,
                                   2048,  4096,  8192,  16384, 1,    2,     4,    8,    16,    32};

using test::relative_error;

Tensor random(at::IntArrayRef sizes, at::ScalarType dtype = at::kDouble, uint64_t seed = 1) {
  return at::randn(sizes, at::make_generator<at::CPUGeneratorImpl>(seed), at::TensorOptions(dtype));
}

class ThreadCount {
 public:
  explicit ThreadCount(int count) : before_(at::get_num_threads()) { at::set_num_threads(count); }
  ~ThreadCount() { at::set_num_threads(before_); }

 private:
  int before_;
};

void expect_same_rows(const Tensor& got, const Tensor& expected, double tolerance, int64_t n) {
  EXPECT_EQ(got.sizes(), expected.sizes()) << "n = " << n;
  EXPECT_LE(relative_error(got, expected), tolerance) << "n = " << n;
}

TEST(HadamardConstruction, RowsOfEveryFactorAreOrthogonal) {
  // 92, 116 and 172 are found by search, the others by Paley.
  for (int64_t order = 4; order <= 400; order += 4) {
    const std::vector<int64_t> factors = hadamard_factors(order);
    for (const int64_t m : factors) {
      const Eigen::MatrixXi h = hadamard_signs(m).cast<int>();
      ASSERT_EQ(h.rows(), m);
      ASSERT_TRUE((h.array().abs() == 1).all()) << "order " << m;
      ASSERT_TRUE(h * h.transpose() == Eigen::MatrixXi::Identity(m, m) * int(m)) << "order " << m;
    }
  }
}

TEST(HadamardConstruction, CoversEveryMultipleOfFourBelow236ExceptTwo) {
  for (int64_t n = 4; n < 236; n += 4) {
    EXPECT_EQ(hadamard_block_size(n) == n, n != 156 && n != 188) << "n = " << n;
  }
}

TEST(HadamardConstruction, PaleyWorksOverPrimePowerFields) {
  // 27 = 3^3, 343 = 7^3 and 243 = 3^5 for Paley I; 9, 25, 49, 81 and 125 for Paley II.
  for (const int64_t order : {28, 344, 244, 20, 52, 100, 164, 252}) {
    const Eigen::MatrixXi h = hadamard_signs(order).cast<int>();
    EXPECT_TRUE(h * h.transpose() == Eigen::MatrixXi::Identity(order, order) * int(order)) << "order " << order;
  }
}

TEST(HadamardConstruction, FactorsMultiplyToTheSize) {
  for (const int64_t n : kModelSizes) {
    int64_t product = 1;
    for (const int64_t m : hadamard_factors(n)) product *= m;
    EXPECT_EQ(product, n);
    EXPECT_EQ(hadamard_block_size(n), n);
  }
}

TEST(HadamardMatrix, IsOrthogonal) {
  for (const int64_t n : {1, 2, 4, 12, 20, 28, 64, 80, 92, 96, 172, 336, 576}) {
    const Tensor h = hadamard_matrix(n);
    EXPECT_EQ(h.scalar_type(), at::kDouble);
    EXPECT_LE((h.matmul(h.t()) - at::eye(n, at::kDouble)).abs().max().item<double>(), 1e-13) << "n = " << n;
    EXPECT_LE((h.abs() * std::sqrt(double(n)) - 1).abs().max().item<double>(), 1e-13) << "n = " << n;
  }
}

TEST(HadamardMatrix, ThrowsWhereThereIsNoConstruction) {
  for (const int64_t n : {3, 6, 90, 188}) EXPECT_THROW(hadamard_matrix(n), c10::Error) << n;
  EXPECT_THROW(hadamard_block_size(0), c10::Error);
}

TEST(HadamardTransform, IsTheProductWithTheMatrix) {
  for (const int64_t n : {1,  2,  4,  8,  16,  32,  64,  128, 256, 512, 1024, 2048, 12,   20,
                          24, 80, 96, 92, 144, 192, 320, 336, 576, 896, 1344, 1536, 2752, 3584}) {
    const Tensor x = random({19, n});
    const Tensor h = hadamard_matrix(n);
    expect_same_rows(hadamard_transform(x), x.matmul(h), 1e-14, n);
    expect_same_rows(hadamard_transform(x, /*transpose=*/true), x.matmul(h.t()), 1e-14, n);
    expect_same_rows(hadamard_by_products(x, n, false), x.matmul(h), 1e-13, n);
    expect_same_rows(hadamard_by_products(x, n, true), x.matmul(h.t()), 1e-13, n);
  }
}

TEST(HadamardTransform, TransposeIsTheInverseAtEveryModelSize) {
  for (const int64_t n : kModelSizes) {
    const Tensor x = random({3, n});
    const Tensor y = hadamard_transform(x);
    expect_same_rows(hadamard_transform(y, /*transpose=*/true), x, 1e-12, n);
    expect_same_rows(hadamard_transform(hadamard_transform(x, true)), x, 1e-12, n);
    // An orthogonal matrix whose entries all have size 1 / sqrt(n): rows of random positions, against each other.
    const Tensor positions = at::randperm(n, at::make_generator<at::CPUGeneratorImpl>(uint64_t(2))).slice(0, 0, 8);
    const Tensor units = at::zeros({positions.numel(), n}, at::kDouble);
    for (int64_t i = 0; i < positions.numel(); ++i) units[i][positions[i].item<int64_t>()] = 1;
    const Tensor rows = hadamard_transform(units);
    EXPECT_LE((rows.matmul(rows.t()) - at::eye(rows.size(0), at::kDouble)).abs().max().item<double>(), 1e-12) << n;
    EXPECT_LE((rows.abs() * std::sqrt(double(n)) - 1).abs().max().item<double>(), 1e-12) << n;
  }
}

TEST(HadamardTransform, SinglePrecisionAgreesWithDouble) {
  for (const int64_t n : kModelSizes) {
    const Tensor x = random({5, n}, at::kFloat);
    const Tensor y = hadamard_transform(x);
    EXPECT_EQ(y.scalar_type(), at::kFloat);
    expect_same_rows(y, hadamard_transform(x.to(at::kDouble)), 1e-6, n);
  }
}

TEST(HadamardTransform, HalfTypesAreComputedInSinglePrecision) {
  for (const at::ScalarType dtype : {at::kHalf, at::kBFloat16}) {
    const Tensor x = random({7, 1536}, at::kFloat).to(dtype);
    const Tensor y = hadamard_transform(x);
    EXPECT_EQ(y.scalar_type(), dtype);
    EXPECT_TRUE(at::equal(y, hadamard_transform(x.to(at::kFloat)).to(dtype)));
  }
}

TEST(HadamardTransform, ResultDependsNeitherOnThreadsNorOnTheOtherRows) {
  for (const int64_t n : {64, 80, 96, 576, 1536, 8192}) {
    const Tensor x = random({1037, n}, at::kFloat);
    Tensor one;
    {
      const ThreadCount threads(1);
      one = hadamard_transform(x);
    }
    const ThreadCount threads(3);
    EXPECT_TRUE(at::equal(hadamard_transform(x), one)) << n;
    EXPECT_TRUE(at::equal(hadamard_transform(x.slice(0, 500, 523)), one.slice(0, 500, 523))) << n;
  }
}

TEST(HadamardTransform, ReadsStridedInputAndLeavesItAlone) {
  const Tensor base = random({80, 5, 6});
  const Tensor x = base.permute({2, 1, 0});
  const Tensor copy = x.clone(at::MemoryFormat::Contiguous);
  EXPECT_TRUE(at::equal(hadamard_transform(x), hadamard_transform(copy)));
  EXPECT_TRUE(at::equal(x, copy));
  const Tensor broadcast = random({64}).expand({4, 64});
  EXPECT_TRUE(at::equal(hadamard_transform(broadcast)[3], hadamard_transform(broadcast[0])));
}

TEST(HadamardTransform, AcceptsEmptyAndOneDimensionalInput) {
  EXPECT_EQ(hadamard_transform(at::empty({0, 64})).sizes(), at::IntArrayRef({0, 64}));
  EXPECT_EQ(hadamard_transform(at::empty({3, 0, 80})).sizes(), at::IntArrayRef({3, 0, 80}));
  const Tensor x = random({96});
  EXPECT_LE(relative_error(hadamard_transform(x), x.matmul(hadamard_matrix(96))), 1e-14);
  EXPECT_THROW(hadamard_transform(at::ones({4}, at::kLong)), c10::Error);
  EXPECT_THROW(hadamard_transform(at::ones({})), c10::Error);
}

TEST(HadamardTransform, FallsBackToDiagonalBlocks) {
  const std::vector<std::pair<int64_t, int64_t>> sizes = {{7, 1}, {6, 2}, {90, 2}, {188, 4}, {376, 8}, {156, 52}};
  for (const auto& [n, block] : sizes) {
    ASSERT_EQ(hadamard_block_size(n), block);
    const Tensor x = random({5, n});
    const Tensor expected = x.reshape({5, -1, block}).matmul(hadamard_matrix(block)).reshape({5, n});
    expect_same_rows(hadamard_transform(x), expected, 1e-14, n);
    expect_same_rows(hadamard_transform(hadamard_transform(x), true), x, 1e-12, n);
    expect_same_rows(hadamard_by_products(x, block, false), expected, 1e-13, n);
  }
}

TEST(HadamardTransform, GradientMatchesFiniteDifferences) {
  for (const int64_t n : {12, 20, 64}) {
    for (const bool transpose : {false, true}) {
      Tensor x = random({2, n});
      const Tensor weight = random({2, n}, at::kDouble, 3);
      const auto loss = [&](const Tensor& input) {
        const Tensor y = hadamard_transform(input, transpose);
        return (weight * y * y * y).sum();
      };
      x.set_requires_grad(true);
      loss(x).backward();
      const Tensor direction = random({2, n}, at::kDouble, 4);
      const at::NoGradGuard no_grad;
      const double step = 1e-5;
      const double numeric = ((loss(x + step * direction) - loss(x - step * direction)) / (2 * step)).item<double>();
      EXPECT_NEAR((x.grad() * direction).sum().item<double>(), numeric, 1e-7 * std::abs(numeric)) << n;
    }
  }
}

}  // namespace
}  // namespace baseq
