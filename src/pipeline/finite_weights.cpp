#include "finite_weights.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <set>

#include "../quant/finite.h"
#include "model/named_tensors.h"

namespace baseq {
namespace {

constexpr size_t kMaxNamed = 10;

}  // namespace

std::vector<std::string> weights_not_finite(const Checkpoint& checkpoint, const Model& model) {
  std::vector<std::string> problems;
  size_t found = 0;
  std::set<std::string> seen;  // the parts of a fused tensor are one
  int64_t block = -1;
  for_each_tensor(model.config(), [&](const std::string& name, at::IntArrayRef) {
    if (block + 1 < model.config().num_hidden_layers && name.starts_with(layer_prefix(block + 1))) {
      checkpoint.release_pages();
      ++block;
    }
    const std::string stored = model.tensors().stored_name(name);
    if (!checkpoint.contains(stored) || !seen.insert(stored).second) return;
    const Tensor tensor = checkpoint.tensor(stored);
    if (!tensor.is_floating_point() || all_finite(tensor) || ++found > kMaxNamed) return;
    problems.push_back(fmt::format("{}{}: {} of {} values are NaN or infinite; fetch the checkpoint again or repair it",
                                   stored, block < 0 ? "" : fmt::format(" (block {})", block),
                                   tensor.isfinite().logical_not().sum().item<int64_t>(), tensor.numel()));
  });
  checkpoint.release_pages();
  if (found > kMaxNamed)
    problems.push_back(fmt::format("and {} more tensors with NaN or infinities", found - kMaxNamed));
  return problems;
}

}  // namespace baseq
