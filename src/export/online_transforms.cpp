#include "online_transforms.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "baseq/transform/hadamard.h"

namespace baseq {
namespace {

using nlohmann::json;

constexpr const char* kWhoExecutes =
    "Online Hadamard transforms (transform_config): vLLM executes them on one GPU (it refuses tensor parallelism with "
    "them, and its CPU build crashes). transformers ignores them without an error and then computes garbage, also "
    "with the compressed-tensors package installed.";

constexpr const char* kReadme = R"(# Online transforms

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

/// One of the three places that can have a transform, named as in recipes.
struct Place {
  const char* name;
  const char* pattern;         ///< of the linears' names
  const SourceLinear* linear;  ///< the first of them
};

std::vector<Place> places(const ExportSource& source) {
  std::vector<Place> found;
  for (const SourceLinear& linear : source.linears()) {
    if (linear.block > 0 || !source.is_rotated_online(linear)) continue;
    const bool fused = source.config().fused_projections;
    const Site site = input_site(linear.name);
    const Place place = site == Site::kO      ? Place{"o", "re:.*o_proj$", &linear}
                        : site == Site::kDown ? Place{"down", "re:.*down_proj$", &linear}
                        : fused               ? Place{"input", "re:.*(qkv|gate_up)_proj$", &linear}
                                              : Place{"input", "re:.*(q|k|v|gate|up)_proj$", &linear};
    const bool known = std::any_of(found.begin(), found.end(),
                                   [&](const Place& other) { return std::string(other.name) == place.name; });
    if (!known) found.push_back(place);
  }
  return found;
}

}  // namespace

void add_transforms(ExportPlan& plan, const std::shared_ptr<const ExportSource>& source, at::ScalarType dtype) {
  const std::vector<Place> found = places(*source);
  if (found.empty()) return;
  json groups = json::object();
  std::vector<std::string> patterns;
  for (const Place& place : found) {
    const int64_t features = place.linear->in_features, block = hadamard_block_size(features);
    // Runtimes build a power of two themselves, and fast; another size is a stored matrix, one for all layers.
    const bool built = is_power_of_two(block) && at::equal(signs(block), sylvester(block));
    const auto apply = [&](const char* location, bool inverse) {
      return json{
          {"targets", {place.pattern}}, {"location", location}, {"inverse", inverse}, {"ignore", json::array()}};
    };
    groups[place.name] = {{"type", built ? "hadamard" : "random-hadamard"},
                          {"head_dim", block == features ? json(nullptr) : json(block)},
                          {"randomize", false},
                          {"requires_grad", false},
                          {"precision", "torch.float32"},
                          {"apply", {apply("input", false), apply("weight_input", true)}}};
    patterns.push_back(fmt::format("`{}`", place.pattern));
    if (built) continue;
    const std::string name = fmt::format("{}.{}_input.weight", place.linear->full_name, place.name);
    const auto matrix = [block, dtype] { return signs(block).to(dtype); };
    plan.tensors.push_back({name, dtype, {block, block}, matrix});
    plan.check_weights = [=, before = plan.check_weights](const Checkpoint& written,
                                                          const std::function<void()>& step) {
      before(written, step);
      expect_written(written.tensor(name), matrix(), name);
    };
    plan.notes.push_back(
        fmt::format("The Hadamard matrix of {} is stored, and runtimes multiply by it as a dense one: "
                    "only sizes that are powers of two have a fast transform there.",
                    block));
  }
  plan.config["quantization_config"]["transform_config"] = {{"config_groups", groups}};
  plan.notes.push_back(kWhoExecutes);
  plan.readme = fmt::format(fmt::runtime(kReadme), fmt::join(patterns, ", "));
}

}  // namespace baseq
