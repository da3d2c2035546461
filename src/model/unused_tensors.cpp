#include "model/unused_tensors.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <map>
#include <optional>
#include <system_error>

#include "../io/strict_json.h"
#include "model/named_tensors.h"

namespace baseq {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kModelPrefix = "model.", kBlocks = "layers.", kBias = ".bias", kHead = "lm_head.weight";
/// Rows that are compared at a time.
constexpr int64_t kRowsPerChunk = 4096;

/// What versions of transformers or its models stored though they compute it: frequencies of rotary embeddings and
/// masks.
constexpr std::string_view kBuffers[] = {"rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached",
                                         "masked_bias",         "self_attn.bias",        "attention.bias"};

struct Verdict {
  std::string reason;
  bool harmless;
};

/// Of "layers.12.mlp.up_proj.weight": 12.
std::optional<int64_t> block_of(std::string_view name) {
  if (!name.starts_with(kBlocks)) return std::nullopt;
  name.remove_prefix(kBlocks.size());
  int64_t block = 0;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), block);
  if (error != std::errc() || end == name.data() + name.size() || *end != '.') return std::nullopt;
  return block;
}

bool is_linear_bias(std::string_view name, const ModelConfig& config) {
  if (!name.ends_with(kBias)) return false;
  name.remove_suffix(kBias.size());
  for (const LinearShape& linear : linear_shapes(config)) {
    if (name.ends_with(std::string(".") + linear.name)) return true;
  }
  for (const SiteInfo& info : sites()) {
    if (!info.fused.empty() && name.ends_with("." + std::string(info.fused))) return true;
  }
  return false;
}

bool repeats_embedding(const Model& model) {
  if (model.stored().linears.contains("model.embed_tokens")) return false;  // codes have no such twin
  const Tensor head = model.checkpoint().tensor(kHead);
  const Tensor embedding = model.tensors().tensor("model.embed_tokens.weight");
  if (head.sizes() != embedding.sizes() || head.dim() == 0) return false;
  for (int64_t row = 0; row < head.size(0); row += kRowsPerChunk) {
    const int64_t rows = std::min(kRowsPerChunk, head.size(0) - row);
    if (!at::equal(head.narrow(0, row, rows).to(at::kDouble), embedding.narrow(0, row, rows).to(at::kDouble))) {
      return false;
    }
  }
  return true;
}

Verdict judge(const Model& model, const std::string& stored) {
  const ModelConfig& config = model.config();
  std::string_view name = stored;
  if (name.starts_with(kModelPrefix)) name.remove_prefix(kModelPrefix.size());
  const auto ends = [&](std::string_view ending) { return name.ends_with(ending); };
  if (std::any_of(std::begin(kBuffers), std::end(kBuffers), ends)) {
    return {"buffers of other programs, which every model computes itself", true};
  }
  if (const auto block = block_of(name); block && *block >= config.num_hidden_layers) {
    return {fmt::format("config.json says num_hidden_layers {}; correct it, or remove the other blocks",
                        config.num_hidden_layers),
            false};
  }
  if (stored == kHead && config.tie_word_embeddings) {
    if (repeats_embedding(model)) return {"it repeats the embedding, which is the head (tie_word_embeddings)", true};
    return {
        "config.json says that the embedding is the head, but the two differ; set tie_word_embeddings to false, or "
        "remove the tensor",
        false};
  }
  if (is_linear_bias(name, config)) {
    if (!model.checkpoint().tensor(stored).any().item<bool>()) return {"biases of zero, which change nothing", true};
    return {fmt::format("{} with this config.json has no such biases (attention_bias, mlp_bias); correct it, or remove "
                        "the tensors",
                        config.architecture),
            false};
  }
  return {
      fmt::format("{} has no such tensors; remove them if the model computes the same without", config.architecture),
      false};
}

}  // namespace

std::string Unused::message() const {
  const std::string more = names.size() > 1 ? fmt::format(" and {} more are", names.size() - 1) : " is";
  return fmt::format("{}{} not used: {}", quote(names.front()), more, reason);
}

std::vector<Unused> find_unused(const Model& model) {
  const c10::NoGradGuard no_grad;
  std::vector<Unused> found;
  const auto add = [&](const std::string& name, const Verdict& verdict) {
    auto same = std::find_if(found.begin(), found.end(), [&](const Unused& u) { return u.reason == verdict.reason; });
    if (same == found.end()) same = found.insert(found.end(), {verdict.reason, {}, verdict.harmless});
    same->names.push_back(name);
  };
  for (const std::string& name : model.unused_names()) add(name, judge(model, name));
  std::error_code error;
  if (!fs::is_directory(model.checkpoint().path(), error)) return found;
  for (const char* file : {"adapter_config.json", "adapter/adapter_config.json"}) {
    if (fs::exists(model.checkpoint().path() / file, error)) {
      add(file, {"adapters are not applied; merge it into the weights (peft: merge_and_unload), or remove it", false});
    }
  }
  return found;
}

}  // namespace baseq
