#include "finite_weights.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <set>

#include "../quant/finite.h"

namespace baseq {
namespace {

constexpr size_t kMaxNamed = 10;

std::vector<std::string> names_of_block(const ModelConfig& config, int64_t block) {
  const std::string prefix = layer_prefix(block);
  std::vector<std::string> names;
  for (const char* norm : {"input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"}) {
    names.push_back(prefix + norm + ".weight");
  }
  for (const LinearShape& linear : linear_shapes(config)) {
    names.push_back(prefix + linear.name + ".weight");
    if (linear.bias) names.push_back(prefix + linear.name + ".bias");
  }
  return names;
}

}  // namespace

std::vector<std::string> weights_not_finite(const Checkpoint& checkpoint, const Model& model) {
  const ModelConfig& config = model.config();
  std::vector<std::string> problems;
  size_t found = 0;
  std::set<std::string> seen;  // the parts of a fused tensor are one
  const auto check = [&](const std::string& name, const std::string& where) {
    const std::string stored = model.tensors().stored_name(name);
    if (!checkpoint.contains(stored) || !seen.insert(stored).second) return;
    const Tensor tensor = checkpoint.tensor(stored);
    if (!tensor.is_floating_point() || all_finite(tensor) || ++found > kMaxNamed) return;
    problems.push_back(fmt::format("{}{}: {} of {} values are NaN or infinite; fetch the checkpoint again or repair it",
                                   stored, where, tensor.isfinite().logical_not().sum().item<int64_t>(),
                                   tensor.numel()));
  };
  check("model.embed_tokens.weight", "");
  checkpoint.release_pages();
  for (int64_t block = 0; block < config.num_hidden_layers; ++block) {
    const std::string where = fmt::format(" (block {})", block);
    for (const std::string& name : names_of_block(config, block)) check(name, where);
    checkpoint.release_pages();
  }
  check("model.norm.weight", "");
  if (!config.tie_word_embeddings) check("lm_head.weight", "");
  checkpoint.release_pages();
  if (found > kMaxNamed)
    problems.push_back(fmt::format("and {} more tensors with NaN or infinities", found - kMaxNamed));
  return problems;
}

}  // namespace baseq
