#include "pipeline/recompute.h"

#include <gtest/gtest.h>

#include <cmath>
#include <deque>
#include <limits>
#include <utility>

#include "block_test.h"
#include "pipeline/candidate.h"

namespace baseq {
namespace {

/// Three blocks of a tiny model with quant points and codes, in float64.
class Recompute : public test::BlockTest {
 protected:
  Recompute() : BlockTest(at::kDouble) {
    grids = test::grids_of_bits(4, shape);
    for (uint64_t b = 0; b < 3; ++b) {
      OpenBlock block({}, place, [this, b] { return test::tiny_layer(shape, 1 + b); });
      run(block, {PointsStep{.at = test::kInputSites, .clip = 0.9, .shift = PointsStep::Shift::kMean},
                  PointsStep{.at = test::kCacheSites, .clip = 0.95, .shift = PointsStep::Shift::kMean}, RoundStep{}});
      candidates.emplace_back(step, block, given, Candidate::Holds::kCodes);
      for (const Parameter& parameter : candidates.back().parameters()) {
        leaves.insert(leaves.end(), parameter.leaves.begin(), parameter.leaves.end());
      }
    }
  }
  BlockChain chain() {
    return {.num_blocks = 3,
            .build =
                [this](int64_t block, bool again) {
                  built.emplace_back(block, again);
                  return candidates[size_t(block)].build(Candidate::Phase::kLearning);
                },
            .rope = inputs.rope};
  }
  Tensor loss_of(const Tensor& hidden) const { return (hidden - target).square().sum(); }
  void forget_gradients() {
    for (Tensor& leaf : leaves) leaf.mutable_grad() = Tensor();
  }

  LearnStep step{.rates = {{"*.clip", 1}, {"*.shift", 1}, {"*.gain", 1}, {"*.norm", 1}, {"*.weight_scale", 1}},
                 .products = at::kDouble};
  BlockTask given = task();
  std::deque<Candidate> candidates;
  std::vector<Tensor> leaves;
  std::vector<std::pair<int64_t, bool>> built;
};

TEST_P(Recompute, GivesTheGradientsOfOneGraph) {
  Tensor whole = x;
  const BlockChain blocks = chain();
  for (int64_t b = 0; b < 3; ++b) whole = blocks.build(b, false).forward(whole, inputs.rope);
  const Tensor loss = loss_of(whole);
  loss.backward();
  std::vector<Tensor> expected;
  for (const Tensor& leaf : leaves) expected.push_back(leaf.grad().clone());
  forget_gradients();
  built.clear();
  const double value = blocks.backward(x, [&](const Tensor& hidden) {
    EXPECT_FALSE(hidden.requires_grad());
    const Tensor end = hidden.detach().requires_grad_(true);
    const Tensor at_end = loss_of(end);
    at_end.backward();
    return BlockChain::AtEnd{at_end.item<double>(), end.grad()};
  });
  EXPECT_EQ(value, loss.item<double>());
  for (size_t i = 0; i < leaves.size(); ++i) {
    EXPECT_LT((leaves[i].grad() - expected[i]).norm().item<double>(), 1e-12 * (1 + expected[i].norm().item<double>()))
        << i;
  }
  EXPECT_EQ(built, (std::vector<std::pair<int64_t, bool>>{
                       {0, false}, {1, false}, {2, false}, {2, true}, {1, true}, {0, true}}));
}

TEST_P(Recompute, ALossThatIsNotFiniteHasNoGradients) {
  const double value = chain().backward(x, [](const Tensor&) {
    return BlockChain::AtEnd{std::numeric_limits<double>::quiet_NaN(), {}};
  });
  EXPECT_TRUE(std::isnan(value));
  for (const Tensor& leaf : leaves) EXPECT_FALSE(leaf.grad().defined());
}

INSTANTIATE_TEST_SUITE_P(Shapes, Recompute, testing::ValuesIn(test::tiny_shapes()), test::shape_name);

}  // namespace
}  // namespace baseq
