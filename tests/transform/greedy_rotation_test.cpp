#include "transform/greedy_rotation.h"

#include <gtest/gtest.h>

#include "../random_tensors.h"
#include "transform/random_rotation.h"

namespace baseq {
namespace {

/// Tokens with loud channels and one loud token.
Tensor loud_tokens(int64_t num_tokens, int64_t features, uint64_t seed) {
  Tensor x = test::random_normal({num_tokens, features}, seed);
  x.select(1, features / 3).mul_(40);
  x.select(1, features - 1).mul_(15);
  x[num_tokens / 2][features / 2] = 300;
  return x;
}

double largest_in(const Tensor& x, int64_t block, int64_t size) {
  return x.narrow(1, block * size, size).abs().max().item<double>();
}

TEST(RandomRotation, IsOrthogonalAndFollowsItsSeed) {
  for (const int64_t n : {1, 2, 7, 24}) {
    const Tensor rotation = random_rotation(n, 3);
    EXPECT_LT((rotation.matmul(rotation.t()) - at::eye(n, at::kDouble)).abs().max().item<double>(), 1e-13) << n;
    EXPECT_TRUE(at::equal(rotation, random_rotation(n, 3)));
  }
  EXPECT_FALSE(at::equal(random_rotation(5, 3), random_rotation(5, 4)));
  EXPECT_NE(derived_seed(1, 0), derived_seed(1, 1));
  EXPECT_NE(derived_seed(1, 0), derived_seed(0, 1));
}

TEST(GreedyRotation, IsOrthogonalAndLowersTheLargestValueOfEachBlock) {
  for (const auto& [features, size] : std::vector<std::pair<int64_t, int64_t>>{{8, 8}, {24, 8}, {36, 9}, {64, 16}}) {
    const Tensor x = loud_tokens(12, features, 5);
    const Tensor rotation = greedy_rotation(x, size, 64, 7);
    ASSERT_EQ(rotation.sizes(), (std::vector<int64_t>{features / size, size, size}));
    const Tensor identity = at::eye(size, at::kDouble);
    EXPECT_LT((rotation.matmul(rotation.mT()) - identity).abs().max().item<double>(), 1e-11);
    const Tensor rotated = x.unflatten(1, {-1, size}).transpose(0, 1).matmul(rotation).transpose(0, 1).flatten(1);
    for (int64_t block = 0; block < features / size; ++block) {
      EXPECT_LE(largest_in(rotated, block, size), largest_in(x, block, size)) << features << " " << block;
    }
    EXPECT_LT(rotated.abs().max().item<double>(), 0.75 * 300) << features;
    EXPECT_TRUE(at::equal(rotation, greedy_rotation(x, size, 64, 7)));
  }
}

TEST(GreedyRotation, MoreStepsAreNeverWorse) {
  const Tensor x = loud_tokens(20, 16, 6);
  double before = x.abs().max().item<double>();
  for (const int64_t steps : {0, 1, 4, 16, 64, 256}) {
    const double largest = x.matmul(greedy_rotation(x, 16, steps, 7)[0]).abs().max().item<double>();
    EXPECT_LE(largest, before + 1e-12) << steps;
    before = largest;
  }
}

TEST(GreedyRotation, NothingToSpreadIsTheIdentity) {
  EXPECT_TRUE(at::equal(greedy_rotation(at::zeros({3, 4}, at::kDouble), 4, 8, 1)[0], at::eye(4, at::kDouble)));
  EXPECT_TRUE(at::equal(greedy_rotation(at::zeros({0, 4}, at::kDouble), 2, 8, 1)[1], at::eye(2, at::kDouble)));
}

TEST(GreedyRotation, OtherShapesAreErrors) {
  EXPECT_THROW(greedy_rotation(at::zeros({3, 4}), 3, 8, 1), c10::Error);
  EXPECT_THROW(greedy_rotation(at::zeros({4}), 4, 8, 1), c10::Error);
  EXPECT_THROW(greedy_rotation(at::zeros({3, 4}, at::kLong), 4, 8, 1), c10::Error);
  EXPECT_THROW(greedy_rotation(at::zeros({3, 4}), 0, 8, 1), c10::Error);
}

TEST(ZigzagPermutation, GivesEachBlockItsShareOfTheLoudChannels) {
  const Tensor magnitudes = at::tensor({1.0, 9.0, 8.0, 2.0, 7.0, 3.0, 4.0, 6.0, 5.0});
  // 9 8 7 | 4 5 6 | 3 2 1 to three blocks in turn.
  EXPECT_TRUE(at::equal(magnitudes.index_select(0, zigzag_permutation(magnitudes, 3)),
                        at::tensor({9.0, 4.0, 3.0, 8.0, 5.0, 2.0, 7.0, 6.0, 1.0})));
  for (const auto& [features, size] : std::vector<std::pair<int64_t, int64_t>>{{12, 3}, {64, 16}, {10, 10}, {6, 1}}) {
    const Tensor random = test::random_normal({features}, 9).abs(), order = zigzag_permutation(random, size);
    EXPECT_TRUE(at::equal(std::get<0>(order.sort()), at::arange(features)));
    const Tensor sums = random.index_select(0, order).view({-1, size}).sum(1);
    EXPECT_LE((sums.max() - sums.min()).item<double>(), random.max().item<double>() + 1e-12);
  }
  EXPECT_THROW(zigzag_permutation(at::zeros({5}), 2), c10::Error);
}

}  // namespace
}  // namespace baseq
