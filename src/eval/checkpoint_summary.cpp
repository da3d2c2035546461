#include "eval/checkpoint_summary.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <utility>

#include "io/hub_cache.h"

namespace baseq {
namespace {

/// The tensors of a linear that count.
constexpr std::string_view kParts[] = {".weight", ".weight_packed", ".weight_scale", ".weight_zero_point",
                                       ".lora_A", ".lora_B",        ".lora_A_scale", ".lora_B_scale"};
constexpr std::string_view kShape = ".weight_shape";

/// "block 3", "blocks 0, 3-5"
std::string describe_ranges(const std::vector<int64_t>& blocks) {
  std::vector<std::string> ranges;
  for (size_t begin = 0, end = 0; begin < blocks.size(); begin = end) {
    while (end < blocks.size() && blocks[end] == blocks[begin] + static_cast<int64_t>(end - begin)) ++end;
    ranges.push_back(end - begin == 1 ? fmt::format("{}", blocks[begin])
                                      : fmt::format("{}-{}", blocks[begin], blocks[end - 1]));
  }
  return fmt::format("{} {}", blocks.size() == 1 ? "block" : "blocks", fmt::join(ranges, ", "));
}

}  // namespace

std::map<std::string, StoredBits> stored_bits(const StoredModel& model) {
  std::map<std::string, StoredBits> found;
  for (const std::string& name : model.tensors.names()) {
    if (!name.starts_with("model.layers.")) continue;
    if (name.ends_with(kShape)) {
      found[name.substr(0, name.size() - kShape.size())].weights +=
          model.tensors.tensor(name).to(at::kDouble).prod().item<double>();
    }
    const auto* part =
        std::find_if(std::begin(kParts), std::end(kParts), [&](auto end) { return name.ends_with(end); });
    if (part == std::end(kParts)) continue;
    const TensorInfo info = model.tensors.info(name);
    const auto count = static_cast<double>(info.numel());
    const bool is_matrix = *part == ".weight";
    if (is_matrix && info.shape.size() != 2) continue;  // a norm
    const std::string linear = name.substr(0, name.size() - part->size());
    double value_bits = 8.0 * static_cast<double>(c10::elementSize(info.dtype));
    const auto format = model.linears.find(linear);
    // Reading GPTQ, AWQ and GGUF unpacks codes and zero points.
    const bool is_code = is_matrix || *part == ".weight_zero_point";
    if (is_code && format != model.linears.end() && format->second.codes == LinearFormat::Codes::kInt8 &&
        format->second.weights && model.format != "compressed-tensors") {
      value_bits = static_cast<double>(format->second.weights->num_bits);
    }
    found[linear].bits += count * value_bits;
    if (is_matrix) found[linear].weights += count;
  }
  return found;
}

double bits_per_weight(const StoredModel& model) {
  StoredBits all;
  for (const auto& [linear, stored] : stored_bits(model)) {
    all.bits += stored.bits;
    all.weights += stored.weights;
  }
  return all.per_weight();
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

std::vector<std::pair<std::string, std::string>> describe_linears(const StoredModel& model) {
  struct Group {
    int64_t size = 0;
    std::map<std::string, std::vector<int64_t>> blocks{};  // by linear
  };
  std::map<std::string, Group> groups;
  std::vector<std::string> order;
  const std::vector<LinearShape> linears = linear_shapes(model.config);
  for (int64_t block = 0; block < model.config.num_hidden_layers; ++block) {
    for (const LinearShape& linear : linears) {
      const auto format = model.linears.find(layer_prefix(block) + linear.name);
      const std::string grid = describe(format == model.linears.end() ? std::nullopt : format->second.weights);
      Group& group = groups[grid];
      if (group.size++ == 0) order.push_back(grid);
      group.blocks[linear.name].push_back(block);
    }
  }
  std::ranges::stable_sort(order, std::ranges::greater{}, [&](const std::string& grid) { return groups[grid].size; });
  std::vector<std::pair<std::string, std::string>> found;
  for (const std::string& grid : order) {
    if (found.empty()) {
      found.emplace_back(grid, fmt::format("{} linears", groups[grid].size));
      continue;
    }
    std::map<std::string, std::vector<std::string_view>> names;  // by blocks
    for (const LinearShape& linear : linears) {
      const auto at = groups[grid].blocks.find(linear.name);
      if (at != groups[grid].blocks.end()) names[describe_ranges(at->second)].push_back(linear.name);
    }
    std::vector<std::string> parts;
    for (const auto& [blocks, of] : names) parts.push_back(fmt::format("{} in {}", fmt::join(of, ", "), blocks));
    found.emplace_back(grid, fmt::format("{}", fmt::join(parts, "; ")));
  }
  return found;
}

CheckpointSummary summarize(const Model& model) {
  const Checkpoint& checkpoint = model.checkpoint();
  CheckpointSummary summary{.name = model_name(checkpoint.path()), .num_bytes = checkpoint.num_bytes()};
  const auto& quantization = model.quantization();
  summary.weights = describe(quantization ? quantization->weights : std::nullopt);
  if (quantization && !quantization->overrides.empty()) {
    summary.weights += fmt::format(", {} linears otherwise", quantization->overrides.size());
  }
  if (quantization && quantization->lora_rank > 0) {
    summary.weights += fmt::format(", corrections of rank {}", quantization->lora_rank);
  }
  if (quantization && quantization->head) summary.weights += "; head " + describe(quantization->head);
  if (quantization && quantization->embedding) summary.weights += "; embedding " + describe(quantization->embedding);
  summary.input_activations = describe(quantization ? quantization->input_activations : std::nullopt);
  summary.kv_cache = describe(quantization ? quantization->kv_cache : std::nullopt);
  summary.format = model.stored().format;
  // A GGUF file has no such section.
  const auto stored = checkpoint.config().find("quantization_config");
  if (quantization && stored != checkpoint.config().end()) {
    const auto recipe = stored->find("recipe");
    if (recipe != stored->end() && recipe->is_object() && recipe->contains("name") && (*recipe)["name"].is_string()) {
      summary.recipe = (*recipe)["name"].get<std::string>();
    }
  }
  summary.bits_per_weight = bits_per_weight(model.stored());
  summary.linears = stored_bits(model.stored());
  summary.uniform = !quantization || quantization->uniform;
  return summary;
}

}  // namespace baseq
