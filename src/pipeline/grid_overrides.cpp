#include "grid_overrides.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>

#include "baseq/model/model.h"
#include "formats/compressed_tensors/config.h"
#include "io/strict_json.h"
#include "model/quantized_linear.h"

namespace baseq {
namespace {

constexpr std::string_view kExpression = "re:";
/// What one match may cost is a share of what this many may.
constexpr size_t kModules = 1024;

/// Whether `name` is `pattern` with any characters in place of each "*".
bool matches_glob(std::string_view pattern, std::string_view name) {
  size_t star = pattern.find('*');
  if (star == std::string_view::npos) return pattern == name;
  if (!name.starts_with(pattern.substr(0, star))) return false;
  name.remove_prefix(star);
  // Between two stars the first place that fits leaves the most for the rest.
  for (pattern.remove_prefix(star + 1); (star = pattern.find('*')) != std::string_view::npos;) {
    const size_t place = name.find(pattern.substr(0, star));
    if (place == std::string_view::npos) return false;
    name.remove_prefix(place + star);
    pattern.remove_prefix(star + 1);
  }
  return name.ends_with(pattern);
}

bool matches(const std::string& pattern, const std::string& name) {
  if (!pattern.starts_with(kExpression)) return matches_glob(pattern, name);
  ModuleTargets expression;
  expression.add(pattern, 0, "grids.overrides");
  expression.limit_steps(kModules, "grids.overrides");
  return expression.find(name).has_value();
}

bool matches_any(const GridOverride& item, const std::string& name) {
  return std::ranges::any_of(item.linears, [&](const std::string& pattern) { return matches(pattern, name); });
}

std::vector<std::string> names_of_linears(const ModelConfig& config) {
  std::vector<std::string> names;
  for (int64_t block = 0; block < config.num_hidden_layers; ++block) {
    for (const LinearShape& linear : linear_shapes(config)) names.push_back(layer_prefix(block) + linear.name);
  }
  return names;
}

}  // namespace

const GridOverride* Grids::override_of(const std::string& linear) const {
  const auto found = std::find_if(overrides.rbegin(), overrides.rend(),
                                  [&](const GridOverride& item) { return matches_any(item, linear); });
  return found == overrides.rend() ? nullptr : &*found;
}

const std::optional<QuantSpec>& Grids::weights_of(const std::string& linear) const {
  const GridOverride* found = override_of(linear);
  return found ? found->weights : weights;
}

Grids Grids::in_block(int64_t block) const {
  Grids grids = *this;
  grids.overrides.clear();
  if (overrides.empty()) return grids;
  DecoderLayer{}.for_each_linear([&](const std::string& name, const Linear&) {
    if (const GridOverride* found = override_of(layer_prefix(block) + name)) {
      grids.overrides.push_back({.linears = {name}, .weights = found->weights});
    }
  });
  return grids;
}

void check_pattern(const std::string& pattern, const std::string& path) {
  TORCH_CHECK(!pattern.empty(), path, ": an empty name matches no linear");
  if (pattern.starts_with(kExpression)) ModuleTargets().add(pattern, 0, path);
}

std::vector<std::string> unmatched_patterns(const Grids& grids, const ModelConfig& config) {
  std::vector<std::string> problems;
  const std::vector<std::string> names = names_of_linears(config);
  for (size_t i = 0; i < grids.overrides.size(); ++i) {
    for (const std::string& pattern : grids.overrides[i].linears) {
      if (std::ranges::any_of(names, [&](const std::string& name) { return matches(pattern, name); })) continue;
      problems.push_back(
          fmt::format("grids.overrides[{}].linears: {} matches no linear of the blocks; their names run from {} to {}",
                      i, quote(pattern), names.front(), names.back()));
    }
  }
  return problems;
}

std::map<std::string, std::optional<QuantSpec>> overridden_linears(const Grids& grids, const ModelConfig& config) {
  std::map<std::string, std::optional<QuantSpec>> found;
  if (grids.overrides.empty()) return found;
  for (const std::string& name : names_of_linears(config)) {
    const GridOverride* item = grids.override_of(name);
    if (item && item->weights != grids.weights) found[name] = item->weights;
  }
  return found;
}

std::map<std::string, TensorInfo> infos_of_block(const std::map<std::string, Tensor>& first_block, const Grids& grids,
                                                 const ModelConfig& config, int64_t block, at::ScalarType dtype) {
  const std::string prefix = layer_prefix(block);
  std::map<std::string, TensorInfo> infos;
  for (const auto& [name, tensor] : first_block) {
    infos[prefix + name.substr(layer_prefix(0).size())] = {tensor.scalar_type(), tensor.sizes().vec()};
  }
  const Grids own = grids.in_block(block), of_first = grids.in_block(0);
  for (const LinearShape& linear : linear_shapes(config)) {
    const std::optional<QuantSpec>& grid = own.weights_of(linear.name);
    if (grid == of_first.weights_of(linear.name)) continue;
    const std::string name = prefix + linear.name;
    std::erase_if(infos, [&](const auto& info) {
      return info.first.starts_with(name + ".weight") || (!grid && info.first.starts_with(name + ".lora_"));
    });
    if (grid) {
      infos.merge(quantized_weight_infos(name, *grid, linear.out_features, linear.in_features));
    } else {
      infos[name + ".weight"] = {dtype, {linear.out_features, linear.in_features}};
    }
  }
  return infos;
}

}  // namespace baseq
