#include "recompute.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <utility>

namespace baseq {

Tensor BlockChain::forward(const Tensor& x, std::vector<Tensor>* inputs) const {
  const c10::NoGradGuard no_grad;
  Tensor hidden = x;
  for (int64_t block = 0; block < num_blocks; ++block) {
    if (before_block) before_block();
    if (inputs) inputs->push_back(hidden);
    hidden = build(block, /*again=*/false).forward(hidden, rope);
  }
  return hidden;
}

double BlockChain::backward(const Tensor& x, const std::function<AtEnd(const Tensor&)>& loss) const {
  std::vector<Tensor> inputs;
  AtEnd end = loss(forward(x, &inputs));
  if (!std::isfinite(end.loss)) return end.loss;
  const at::AutoGradMode with_grad(true);
  for (int64_t block = num_blocks - 1; block >= 0; --block) {
    if (before_block) before_block();
    const Tensor input = std::exchange(inputs.back(), {}).detach().requires_grad_(block > 0);
    inputs.pop_back();
    const Tensor output = build(block, /*again=*/true).forward(input, rope);
    if (!output.requires_grad()) break;  // the first block, of which nothing is learned
    output.backward(end.gradient);
    end.gradient = input.grad();
  }
  return end.loss;
}

}  // namespace baseq
