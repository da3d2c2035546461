#include "divided_loss.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include "cluster/tree_sum.h"

namespace baseq {
namespace {

std::vector<Tensor> leaves_of(const std::vector<Parameter>& parameters) {
  std::vector<Tensor> leaves;
  for (const Parameter& parameter : parameters) {
    leaves.insert(leaves.end(), parameter.leaves.begin(), parameter.leaves.end());
  }
  return leaves;
}

/// A loss and its gradients in a row, float64; the leaves have no gradients afterwards.
Tensor take_gradients(const Tensor& loss, const std::vector<Tensor>& leaves) {
  loss.backward({}, /*retain_graph=*/true);
  std::vector<Tensor> parts{loss.detach().to(at::kDouble).reshape({1})};
  for (const Tensor& leaf : leaves) {
    const Tensor gradient = leaf.grad().defined() ? leaf.grad() : at::zeros_like(leaf);
    parts.push_back(gradient.to(at::kDouble).flatten());
    leaf.mutable_grad().reset();
  }
  return at::cat(parts);
}

}  // namespace

Tensor divided_loss(const Communicator& communicator, const std::vector<Parameter>& parameters, const Tensor& chosen,
                    const std::function<int64_t(int64_t)>& owner_of,
                    const std::function<Tensor(const Tensor&)>& loss_of) {
  const std::vector<Tensor> leaves = leaves_of(parameters);
  std::vector<int64_t> owners;
  for (int64_t i = 0; i < chosen.size(0); ++i) owners.push_back(owner_of(chosen[i].item<int64_t>()));
  TreeSum sum(communicator, owners);
  for (int64_t i = 0; i < chosen.size(0); ++i) {
    if (owners[static_cast<size_t>(i)] != communicator.rank) continue;
    sum.add(i, take_gradients(loss_of(chosen.narrow(0, i, 1)), leaves));
  }
  const c10::NoGradGuard no_grad;
  const Tensor mean = sum.total() / static_cast<double>(chosen.size(0));
  int64_t begin = 1;
  for (const Tensor& leaf : leaves) {
    leaf.mutable_grad() = mean.narrow(0, begin, leaf.numel()).view(leaf.sizes()).to(leaf.options());
    begin += leaf.numel();
  }
  return mean[0].clone().requires_grad_(true);
}

}  // namespace baseq
