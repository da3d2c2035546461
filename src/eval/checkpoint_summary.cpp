#include "baseq/eval/checkpoint_summary.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <utility>

#include "baseq/io/hub_cache.h"

namespace baseq {
namespace {

constexpr std::string_view kPacked = ".weight_packed", kPlain = ".weight";

double bits_of(const Checkpoint& checkpoint, const std::string& name) {
  return checkpoint.contains(name) ? 8.0 * static_cast<double>(checkpoint.info(name).nbytes()) : 0;
}

/// Of a code of a linear whose codes have a byte each: fewer where reading unpacked them.
double code_bits(const StoredModel& model, const std::string& linear) {
  const auto it = model.linears.find(linear);
  const bool as_stored = it == model.linears.end() || !it->second.weights || model.format == "compressed-tensors";
  return as_stored ? 8 : static_cast<double>(it->second.weights->num_bits);
}

}  // namespace

double bits_per_weight(const StoredModel& model) {
  const Checkpoint& checkpoint = model.tensors;
  double bits = 0, weights = 0;
  for (const std::string& name : checkpoint.names()) {
    if (!name.starts_with("model.layers.")) continue;
    if (name.ends_with(kPacked)) {
      const std::string linear = name.substr(0, name.size() - kPacked.size());
      for (const char* part : {".weight_packed", ".weight_scale", ".weight_zero_point", ".lora_A", ".lora_B",
                               ".lora_A_scale", ".lora_B_scale"}) {
        bits += bits_of(checkpoint, linear + part);
      }
      weights += checkpoint.tensor(linear + ".weight_shape").to(at::kDouble).prod().item<double>();
    } else if (name.ends_with(kPlain) && checkpoint.contains(name + "_scale")) {
      const double num_bits = code_bits(model, name.substr(0, name.size() - kPlain.size()));
      bits += num_bits * static_cast<double>(checkpoint.info(name).numel()) + bits_of(checkpoint, name + "_scale");
      if (checkpoint.contains(name + "_zero_point")) {
        bits += num_bits * static_cast<double>(checkpoint.info(name + "_zero_point").numel());
      }
      weights += static_cast<double>(checkpoint.info(name).numel());
    } else if (name.ends_with(kPlain) && checkpoint.info(name).shape.size() == 2) {
      bits += bits_of(checkpoint, name);
      weights += static_cast<double>(checkpoint.info(name).numel());
    }
  }
  return weights > 0 ? bits / weights : 0;
}

std::string describe(const std::optional<QuantSpec>& spec) {
  if (!spec) return "full precision";
  const char* strategies[] = {"tensor", "channel", "group", "token"};
  std::string text = fmt::format("{} bits, {}, per {}", spec->num_bits, spec->symmetric ? "symmetric" : "asymmetric",
                                 strategies[static_cast<size_t>(spec->strategy)]);
  if (spec->strategy == Strategy::kGroup) text += fmt::format(" of {}", spec->group_size);
  return text;
}

std::string describe_online(const Model& model) {
  std::vector<std::pair<std::string, std::vector<std::string_view>>> found;  // kinds and the sites that have them
  for (const SiteInfo& info : sites()) {
    std::vector<std::string> forms;
    for (int64_t block = 0; block < model.config().num_hidden_layers; ++block) {
      std::vector<const char*> kinds;
      for (const Factor::Kind kind : model.online_kinds(block, info.site)) kinds.push_back(kind_name(kind));
      const std::string form = kinds.empty() ? "nothing" : fmt::format("{}", fmt::join(kinds, ", "));
      if (std::find(forms.begin(), forms.end(), form) == forms.end()) forms.push_back(form);
    }
    const std::string text = fmt::format("{}", fmt::join(forms, " or "));
    if (text == "nothing") continue;
    auto same = std::find_if(found.begin(), found.end(), [&](const auto& other) { return other.first == text; });
    if (same == found.end()) same = found.insert(found.end(), {text, {}});
    same->second.push_back(info.name);
  }
  std::vector<std::string> parts;
  for (const auto& [text, at] : found) parts.push_back(fmt::format("{} at {}", text, fmt::join(at, ", ")));
  return parts.empty() ? "nothing" : fmt::format("{}", fmt::join(parts, "; "));
}

CheckpointSummary summarize(const Model& model) {
  const Checkpoint& checkpoint = model.checkpoint();
  CheckpointSummary summary{.name = model_name(checkpoint.path()), .num_bytes = checkpoint.num_bytes()};
  const auto& quantization = model.quantization();
  summary.weights = describe(quantization ? quantization->weights : std::nullopt);
  if (quantization && quantization->lora_rank > 0) {
    summary.weights += fmt::format(", corrections of rank {}", quantization->lora_rank);
  }
  summary.input_activations = describe(quantization ? quantization->input_activations : std::nullopt);
  summary.kv_cache = describe(quantization ? quantization->kv_cache : std::nullopt);
  summary.format = model.stored().format;
  if (quantization) {
    const nlohmann::json& stored = checkpoint.config().at("quantization_config");
    const auto recipe = stored.find("recipe");
    if (recipe != stored.end() && recipe->is_object() && recipe->contains("name") && (*recipe)["name"].is_string()) {
      summary.recipe = (*recipe)["name"].get<std::string>();
    }
  }
  summary.bits_per_weight = bits_per_weight(model.stored());
  return summary;
}

}  // namespace baseq
