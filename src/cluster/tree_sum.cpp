#include "tree_sum.h"

#include <ATen/ATen.h>

#include "messages.h"

namespace baseq {
namespace {

void join(TreeSum::Combine combine, Tensor& left, Tensor right) {
  if (!right.defined()) return;
  if (left.defined()) {
    combine(left, right.to(left.device()));
  } else {
    left = std::move(right);
  }
}

}  // namespace

void TreeSum::add_terms(Tensor& left, const Tensor& right) { left.add_(right); }

void TreeSum::take_larger(Tensor& left, const Tensor& right) { at::maximum_out(left, left, right); }

TreeSum::TreeSum(const Communicator& communicator, std::vector<int64_t> owners, Combine combine)
    : communicator_(communicator), owners_(std::move(owners)), combine_(combine) {}

void TreeSum::add(int64_t number, Tensor term) {
  TORCH_INTERNAL_ASSERT(owners_.at(static_cast<size_t>(number)) == communicator_.rank);
  Node node{0, number};
  // As far up as the terms before it are there.
  while (node.second % 2 == 1) {
    const auto left = sums_.find({node.first, node.second - 1});
    if (left == sums_.end()) break;
    Tensor sum = std::move(left->second);
    sums_.erase(left);
    join(combine_, sum, std::move(term));
    term = std::move(sum);
    node = {node.first + 1, node.second / 2};
  }
  sums_[node] = std::move(term);
}

Tensor TreeSum::sum_of(Node node) {
  if (const auto known = sums_.find(node); known != sums_.end()) return std::move(known->second);
  const auto [height, place] = node;
  if (height == 0) return {};
  const auto count = static_cast<int64_t>(owners_.size());
  const int64_t first = place << height, middle = first + (int64_t{1} << (height - 1));
  Tensor left = sum_of({height - 1, 2 * place});
  if (middle >= count) return left;
  Tensor right = sum_of({height - 1, 2 * place + 1});
  const int64_t to = owners_[static_cast<size_t>(first)], from = owners_[static_cast<size_t>(middle)];
  if (to != from) {
    if (communicator_.rank == from) send_tensor(communicator_, to, right);
    if (communicator_.rank == to) right = receive_tensor(communicator_, from);
  }
  if (communicator_.rank != to) return {};
  join(combine_, left, std::move(right));
  return left;
}

Tensor TreeSum::total(bool everywhere) {
  int height = 0;
  while ((int64_t{1} << height) < static_cast<int64_t>(owners_.size())) ++height;
  const Tensor sum = sum_of({height, 0});
  sums_.clear();
  return everywhere ? broadcast(communicator_, sum, owners_.front()) : sum;
}

}  // namespace baseq
