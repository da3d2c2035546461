#include "pipeline/head_loss.h"

#include <gtest/gtest.h>

#include "../tiny_model.h"

namespace baseq {
namespace {

using Loss = LearnStep::Loss;

/// Heads of 40 tokens, and more rows than one chunk has.
class HeadLosses : public testing::TestWithParam<Loss> {
 protected:
  static constexpr int64_t kRows = 300, kHidden = 12, kTokens = 40, kTop = 7;

  static Head head_of(uint64_t seed) {
    return {.norm = {.weight = 1 + 0.2 * test::random_normal({kHidden}, seed), .eps = 1e-5},
            .weight = test::random_normal({kTokens, kHidden}, seed + 1),
            .norm_factor = 1 + 0.1 * test::random_normal({kHidden}, seed + 10)};
  }
  Tensor by_autograd(const Tensor& x) const {
    const Tensor log_p = student.logits(x).log_softmax(-1), reference = teacher.logits(target);
    if (GetParam() == Loss::kCrossEntropy) {
      const Tensor rows = next.ge(0).nonzero().flatten();
      return -log_p.index_select(0, rows).gather(1, next.index_select(0, rows).unsqueeze(1)).mean();
    }
    if (GetParam() == Loss::kKl) {
      return (reference.softmax(-1) * (reference.log_softmax(-1) - log_p)).sum(-1).mean();
    }
    const auto [values, kept] = reference.topk(kTop);
    const Tensor of_kept = student.logits(x).gather(1, kept).log_softmax(-1);
    return (values.softmax(-1) * (values.log_softmax(-1) - of_kept)).sum(-1).mean();
  }

  Head student = head_of(1), teacher = head_of(3);
  Tensor hidden = test::random_normal({kRows, kHidden}, 5), target = test::random_normal({kRows, kHidden}, 6);
  Tensor next = test::random_ids({kRows}, kTokens, 7).masked_fill(at::arange(kRows).remainder(50).eq(49), -1);
  HeadLoss loss{GetParam(), kTop, student, teacher};
};

TEST_P(HeadLosses, AreWhatAutogradSays) {
  const Tensor x = hidden.clone().requires_grad_(true);
  student.norm_factor.requires_grad_(true);
  const Tensor expected = by_autograd(x);
  expected.backward();
  const Tensor of_factor = student.norm_factor.grad().clone();
  student.norm_factor.mutable_grad() = Tensor();
  const HeadLoss::Value got = loss.with_gradient(hidden, target, next);
  EXPECT_NEAR(got.loss, expected.item<double>(), 1e-12);
  EXPECT_EQ(loss.value(hidden, target, next), got.loss);
  EXPECT_LT(test::relative_error(got.gradient, x.grad()), 1e-12);
  EXPECT_LT(test::relative_error(student.norm_factor.grad(), of_factor), 1e-12);
}

TEST_P(HeadLosses, OfTheTeacherItselfAreAMinimum) {
  student = teacher;
  if (GetParam() == Loss::kCrossEntropy) return;
  const HeadLoss::Value got = loss.with_gradient(target, target, next);
  EXPECT_NEAR(got.loss, 0, 1e-14);
  EXPECT_LT(got.gradient.abs().max().item<double>(), 1e-14);
}

INSTANTIATE_TEST_SUITE_P(
    Losses, HeadLosses, testing::Values(Loss::kCrossEntropy, Loss::kKl, Loss::kKlTop), [](const auto& loss) {
      return std::string(loss.param == Loss::kCrossEntropy ? "ce" : loss.param == Loss::kKl ? "kl" : "kl_top");
    });

TEST(HeadLossKlTop, OverAllTokensIsTheDivergence) {
  Head head;
  head.norm.weight = at::ones({6}, at::kDouble);
  head.weight = test::random_normal({9, 6}, 1);
  const Tensor hidden = test::random_normal({4, 6}, 2), target = test::random_normal({4, 6}, 3), next;
  const auto all = HeadLoss(Loss::kKlTop, 1000, head, head).with_gradient(hidden, target, next);
  const auto kl = HeadLoss(Loss::kKl, 1, head, head).with_gradient(hidden, target, next);
  EXPECT_NEAR(all.loss, kl.loss, 1e-14);
  EXPECT_LT(test::relative_error(all.gradient, kl.gradient), 1e-13);
}

}  // namespace
}  // namespace baseq
