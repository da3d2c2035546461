#include "head_loss.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>

namespace baseq {
namespace {

using Loss = LearnStep::Loss;

Tensor product(const Tensor& x, const Tensor& matrix) {
  return at::matmul(x.to(matrix.scalar_type()), matrix).to(x.scalar_type());
}

}  // namespace

Tensor Head::normed(const Tensor& hidden) const {
  if (!norm_factor.defined()) return norm.forward(hidden);
  RmsNorm scaled = norm;
  scaled.weight = norm.weight * norm_factor;
  return scaled.forward(hidden);
}

Tensor Head::logits(const Tensor& hidden) const { return product(normed(hidden), weight.t()); }

HeadLoss::HeadLoss(Loss loss, int64_t top_k, const Head& student, const Head& teacher)
    : loss_(loss), top_k_(std::min(top_k, student.weight.size(0))), student_(student), teacher_(teacher) {
  TORCH_CHECK(loss != Loss::kMse, "HeadLoss: expected a loss at the head");
}

double HeadLoss::term(Tensor& logits, const Tensor& teacher, const Tensor& next) const {
  if (loss_ == Loss::kCrossEntropy) {
    const Tensor rows = next.ge(0).nonzero().flatten(), tokens = next.index_select(0, rows).unsqueeze(1);
    const Tensor log_p = logits.log_softmax(-1);
    logits = log_p.exp();
    const double loss = -log_p.index_select(0, rows).gather(1, tokens).sum(at::kDouble).item<double>();
    logits.index_put_({rows, tokens.flatten()}, at::scalar_tensor(-1, logits.options()), /*accumulate=*/true);
    logits.mul_(next.ge(0).unsqueeze(1));
    return loss;
  }
  // The divergence over some tokens is that of the probabilities given that the next token is one of them.
  const Tensor reference = teacher_.logits(teacher);
  Tensor kept;
  Tensor log_r;
  if (loss_ == Loss::kKlTop) {
    std::tie(log_r, kept) = reference.topk(top_k_, -1, /*largest=*/true, /*sorted=*/false);
    log_r = log_r.log_softmax(-1);
  } else {
    log_r = reference.log_softmax(-1);
  }
  Tensor log_p = (kept.defined() ? logits.gather(1, kept) : logits).log_softmax(-1);
  const Tensor r = log_r.exp();
  const double loss = log_r.sub_(log_p).mul_(r).sum(at::kDouble).item<double>();
  const Tensor gradient = log_p.exp_().sub_(r);
  logits = kept.defined() ? at::zeros_like(logits).scatter_(1, kept, gradient) : gradient;
  return loss;
}

double HeadLoss::count(const Tensor& next) const {
  const int64_t rows = loss_ == Loss::kCrossEntropy ? next.ge(0).sum().item<int64_t>() : next.numel();
  return static_cast<double>(std::max<int64_t>(rows, 1));
}

double HeadLoss::mean(const Tensor& hidden, const Tensor& teacher, const Tensor& next, Tensor* gradient) const {
  double sum = 0;
  const double counted = count(next);
  for (int64_t begin = 0; begin < hidden.size(0); begin += kRowsOfLogits) {
    const int64_t rows = std::min(kRowsOfLogits, hidden.size(0) - begin);
    const auto chunk = [&](const Tensor& of) { return of.defined() ? of.narrow(0, begin, rows) : of; };
    const Tensor x = chunk(hidden).detach().requires_grad_(gradient != nullptr);
    Tensor normed;
    {
      const at::AutoGradMode with_grad(gradient != nullptr);
      normed = student_.normed(x);
    }
    const c10::NoGradGuard no_grad;
    Tensor logits = product(normed.detach(), student_.weight.t());
    sum += term(logits, chunk(teacher), chunk(next));
    if (gradient == nullptr) continue;
    normed.backward(product(logits, student_.weight).div_(counted));
    chunk(*gradient).copy_(x.grad());
  }
  return sum / counted;
}

HeadLoss::Value HeadLoss::with_gradient(const Tensor& hidden, const Tensor& teacher, const Tensor& next) const {
  Value value{.gradient = at::empty_like(hidden)};
  value.loss = mean(hidden, teacher, next, &value.gradient);
  return value;
}

double HeadLoss::value(const Tensor& hidden, const Tensor& teacher, const Tensor& next) const {
  return mean(hidden, teacher, next, nullptr);
}

}  // namespace baseq
