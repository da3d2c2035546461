#include "formats/compressed_tensors/online_transforms.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <set>

#include "baseq/transform/hadamard.h"

namespace baseq {
namespace {

using nlohmann::json;

constexpr const char* kWhoExecutes =
    "Online Hadamard transforms (transform_config): vLLM executes them on one GPU (it refuses tensor parallelism with "
    "them, and its CPU build crashes). transformers ignores them without an error and then computes garbage, also "
    "with the compressed-tensors package installed.";

constexpr const char* kTransformsReadme = R"(## Online transforms

The inputs of {} pass a Hadamard transform while this model runs: `quantization_config.transform_config` in
config.json describes it. A program that does not execute it computes garbage, and most say nothing.

| program | |
|---|---|
| vLLM, one GPU | executes it; tensor parallelism with it is refused |
| vLLM's CPU build | crashes |
| compressed-tensors | `compressed_tensors.transform.apply_transform_config` on the loaded model, with the transforms of location "input" alone: the weights are transformed already |
| transformers | ignores it without an error: **garbage** |
| others | assume not |
)";

/// Entries of +1 and -1, [n, n]: what runtimes multiply by and divide by sqrt(n).
Tensor signs(int64_t n) { return at::round(hadamard_matrix(n) * std::sqrt(static_cast<double>(n))); }

/// The matrix that runtimes construct for type "hadamard".
Tensor sylvester(int64_t n) {
  Tensor matrix = at::ones({1, 1}, at::kDouble);
  while (matrix.size(0) < n) matrix = at::cat({at::cat({matrix, matrix}, 1), at::cat({matrix, -matrix}, 1)});
  return matrix;
}

bool is_power_of_two(int64_t n) { return (n & (n - 1)) == 0; }

/// The first linear of block 0 that reads a site.
const SourceLinear& first_reader(const ExportSource& source, Site site) {
  const auto& linears = source.linears();
  const auto reads = [&](const SourceLinear& linear) { return input_site(linear.name) == site; };
  return *std::find_if(linears.begin(), linears.end(), reads);
}

/// The Hadamard transform that all blocks have at a site; nothing where one of them has none or another transform.
std::optional<Factor> common_hadamard(const ExportSource& source, Site site) {
  std::optional<Factor> common;
  for (int64_t block = 0; block < source.config().num_hidden_layers; ++block) {
    if (source.model().online_kinds(block, site) != std::vector{Factor::Kind::kHadamard}) return std::nullopt;
    const Factor factor = source.model().online_transform(block, site)[0];
    if (common && factor.block != common->block) return std::nullopt;
    common = factor;
  }
  return common;
}

/// A regular expression for the names of the modules that read a site.
std::string pattern_of(const ExportSource& source, const SiteInfo& info) {
  const bool fused = source.config().fused_projections && !info.fused.empty();
  std::vector<std::string_view> names(info.readers.begin(), info.readers.end());
  if (fused) names = {info.fused};
  for (std::string_view& name : names) name.remove_prefix(name.rfind('.') + 1);
  return fmt::format("re:.*({})$", fmt::join(names, "|"));
}

}  // namespace

void add_transform_obstacles(Obstacles& obstacles, const ExportSource& source) {
  for (const SiteInfo& info : sites()) {
    if (!info.is_input() || !source.has_online_transform(info.site)) continue;
    obstacles.add_if(!common_hadamard(source, info.site),
                     fmt::format("an online transform of the {} (site {}) that is not one Hadamard transform for all "
                                 "blocks",
                                 info.label, info.name));
    for (const SourceLinear& linear : source.linears()) {
      const bool biased = linear.block == 0 && input_site(linear.name) == info.site && source.writes_bias(linear);
      obstacles.add_if(biased, fmt::format("a bias of {}, whose input an online transform passes (vLLM asserts that "
                                           "there is none)",
                                           linear.name));
    }
  }
}

void add_transforms(ExportPlan& plan, const std::shared_ptr<const ExportSource>& source, at::ScalarType dtype) {
  json groups = json::object();
  std::vector<std::string> patterns;
  std::set<int64_t> stored;
  for (const SiteInfo& info : sites()) {
    const std::optional<Factor> hadamard = info.is_input() ? common_hadamard(*source, info.site) : std::nullopt;
    if (!hadamard) continue;
    const std::string name(info.name), pattern = pattern_of(*source, info);
    const int64_t block = hadamard->block;
    // Runtimes build a power of two themselves, and fast; another size is a stored matrix, one for all layers.
    const bool built = is_power_of_two(block) && at::equal(signs(block), sylvester(block));
    const auto apply = [&](const char* location, bool inverse) {
      return json{{"targets", {pattern}}, {"location", location}, {"inverse", inverse}, {"ignore", json::array()}};
    };
    groups[name] = {{"type", built ? "hadamard" : "random-hadamard"},
                    {"head_dim", hadamard->blocks == 1 ? json(nullptr) : json(block)},
                    {"randomize", false},
                    {"requires_grad", false},
                    {"precision", "torch.float32"},
                    {"apply", {apply("input", false), apply("weight_input", true)}}};
    patterns.push_back(fmt::format("`{}`", pattern));
    if (built) continue;
    const std::string tensor = fmt::format("{}.{}_input.weight", first_reader(*source, info.site).full_name, name);
    const auto matrix = [block, dtype] { return signs(block).to(dtype); };
    plan.tensors.push_back({tensor, dtype, {block, block}, matrix});
    plan.check_weights = [=, before = plan.check_weights](const Checkpoint& written,
                                                          const std::function<void()>& step) {
      before(written, step);
      expect_written(written.tensor(tensor), matrix(), tensor);
    };
    if (!stored.insert(block).second) continue;
    plan.notes.push_back(
        fmt::format("The Hadamard matrix of {} is stored, and runtimes multiply by it as a dense one: "
                    "only sizes that are powers of two have a fast transform there.",
                    block));
  }
  if (groups.empty()) return;
  plan.config["quantization_config"]["transform_config"] = {{"config_groups", groups}};
  plan.notes.push_back(kWhoExecutes);
  plan.readme = fmt::format(fmt::runtime(kTransformsReadme), fmt::join(patterns, ", "));
}

}  // namespace baseq
