#include "formats/compressed_tensors/config.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <c10/util/Exception.h>
#include <pcre2.h>

#include <algorithm>
#include <cstdio>
#include <tuple>

#include "io/json_object.h"
#include "io/strict_json.h"

namespace baseq {
namespace {

using nlohmann::json;

// Known files have a handful of expressions of less than a hundred bytes, which take a few hundred steps.
constexpr size_t kMaxExpressions = 256, kMaxExpressionBytes = 1024;
constexpr size_t kMaxSteps = size_t{1} << 26, kFewestSteps = 512;
constexpr uint32_t kMaxHeapKibibytes = 1 << 14;

/// Whether `version` ("0.17.1", "0.18.0.a1") is older than the first with dense streams of 3, 5, 6 and 7 bits.
bool pads_words(const std::string& version) {
  int major = 0, minor = 18;
  return std::sscanf(version.c_str(), "%d.%d", &major, &minor) == 2 && std::tie(major, minor) < std::tuple(0, 18);
}

/// The keys that weights and activations have in common; throws unless they describe integers of 2 to 8 bits.
QuantSpec read_integer_grid(JsonObject& args) {
  QuantSpec spec;
  const std::string type = args.text("type", "int");
  TORCH_CHECK(type == "int", args.path(), ": type \"", type, "\" is not supported; supported is \"int\"");
  spec.num_bits = args.integer("num_bits", 8, 2, 8);
  spec.symmetric = args.boolean("symmetric", true);
  for (const char* key : {"block_structure", "observer", "observer_kwargs", "actorder", "scale_dtype", "zp_dtype"}) {
    args.ignore(key);
  }
  return spec;
}

/// What `strategy` says, or what group_size implies where it is missing.
std::string read_strategy(JsonObject& args, int64_t group_size, const char* fallback) {
  return args.text("strategy", group_size > 0 ? "group" : group_size == -1 ? "channel" : fallback);
}

QuantSpec read_weights(JsonObject args) {
  QuantSpec spec = read_integer_grid(args);
  TORCH_CHECK(!args.boolean("dynamic", false), args.path(),
              ": dynamic: weights with ranges of their own at run time "
              "are not supported");
  const int64_t group_size = args.integer("group_size", 0, -1, int64_t{1} << 30);
  const std::string strategy = read_strategy(args, group_size, "tensor");
  const std::vector<std::string> names = {"tensor", "channel", "group"};
  const auto found = std::find(names.begin(), names.end(), strategy);
  TORCH_CHECK(found != names.end(), args.path(), ": strategy \"", strategy,
              "\" is not supported; supported are \"tensor\", \"channel\", \"group\"");
  spec.strategy = static_cast<Strategy>(found - names.begin());
  if (spec.strategy == Strategy::kGroup) {
    TORCH_CHECK(group_size > 0, args.path(), ": strategy \"group\" needs a group_size");
    spec.group_size = group_size;
  }
  args.finish();
  return spec;
}

QuantSpec read_activations(JsonObject args, const json& value) {
  QuantSpec spec = read_integer_grid(args);
  args.ignore("dynamic");
  const auto dynamic = value.find("dynamic");
  TORCH_CHECK(dynamic == value.end() || dynamic->is_boolean(), args.path(), ": dynamic: ", short_json(*dynamic),
              " is not supported; supported are true and false");
  spec.dynamic = dynamic != value.end() && dynamic->get<bool>();
  const int64_t group_size = args.integer("group_size", 0, -1, int64_t{1} << 30);
  const std::string strategy = read_strategy(args, group_size, spec.dynamic ? "token" : "tensor");
  args.finish();
  if (!spec.dynamic) {
    TORCH_CHECK(strategy == "tensor", args.path(), ": static activations with strategy \"", strategy,
                "\" are not supported; supported is \"tensor\"");
    spec.strategy = Strategy::kTensor;
    return spec;
  }
  TORCH_CHECK(strategy == "token" || (strategy == "group" && group_size > 0), args.path(),
              ": dynamic activations with strategy \"", strategy,
              "\" are not supported; supported are \"token\" and "
              "\"group\"");
  TORCH_CHECK(spec.symmetric, args.path(),
              ": dynamic asymmetric activations are not supported: their zero points are "
              "rounded, those of this program are not");
  spec.strategy = strategy == "token" ? Strategy::kToken : Strategy::kGroup;
  if (spec.strategy == Strategy::kGroup) spec.group_size = group_size;
  return spec;
}

/// Transforms that are merged into the weights need nothing; online ones would have to run.
void check_transforms(const json& value, const std::string& path) {
  const auto config = value.find("transform_config");
  if (config == value.end() || !config->is_object() || !config->contains("config_groups")) return;
  for (const auto& [name, scheme] : config->at("config_groups").items()) {
    const auto applied = scheme.find("apply");
    if (applied == scheme.end()) continue;
    for (const json& apply : *applied) {
      const std::string location = JsonObject(apply, path + ": transform_config: " + name).text("location", "");
      TORCH_CHECK(location == "weight_input" || location == "weight_output", path, ": transform_config: ", name,
                  ": an online transform at \"", location,
                  "\" is not supported; supported are transforms that are merged into the weights");
    }
  }
}

bool is_empty(const json& value, const char* key) {
  const auto it = value.find(key);
  return it == value.end() || it->is_null() || (it->is_structured() && it->empty());
}

}  // namespace

void ModuleTargets::add(const std::string& target, size_t value, const std::string& path) {
  constexpr std::string_view kPrefix = "re:";
  if (!target.starts_with(kPrefix)) {
    names_.emplace(target, value);
    if (target == "Linear" && !class_) class_ = value;
    return;
  }
  TORCH_CHECK(expressions_.size() < kMaxExpressions, path, ": ", quote(target), " is regular expression ",
              expressions_.size() + 1, " of the file; at most ", kMaxExpressions, " are supported");
  TORCH_CHECK(target.size() <= kMaxExpressionBytes, path, ": the regular expression ", quote(target), " has ",
              target.size(), " bytes; at most ", kMaxExpressionBytes, " are supported");
  int error = 0;
  PCRE2_SIZE offset = 0;
  const auto* begin = reinterpret_cast<PCRE2_SPTR>(target.data() + kPrefix.size());
  pcre2_code* code = pcre2_compile(begin, target.size() - kPrefix.size(), PCRE2_ANCHORED, &error, &offset, nullptr);
  TORCH_CHECK(code != nullptr, path, ": ", quote(target), " is not a regular expression (character ", offset, ")");
  const std::shared_ptr<const pcre2_code> shared(
      code, [](const pcre2_code* p) { pcre2_code_free(const_cast<pcre2_code*>(p)); });
  expressions_.push_back({target, shared, value});
}

void ModuleTargets::limit_steps(size_t num_modules, const std::string& path) {
  if (expressions_.empty()) return;
  const size_t steps = kMaxSteps / (expressions_.size() * num_modules);
  TORCH_CHECK(steps >= kFewestSteps, path, ": ", expressions_.size(), " regular expressions for ", num_modules,
              " modules take too long; at most ", kMaxSteps / kFewestSteps / num_modules, " are supported");
  context_.reset(pcre2_match_context_create(nullptr), &pcre2_match_context_free);
  TORCH_CHECK(context_, path, ": no memory for a regular expression");
  pcre2_set_match_limit(context_.get(), static_cast<uint32_t>(steps));
  pcre2_set_heap_limit(context_.get(), kMaxHeapKibibytes);
}

std::optional<size_t> ModuleTargets::find(const std::string& module) const {
  if (const auto it = names_.find(module); it != names_.end()) return it->second;
  for (const Expression& expression : expressions_) {
    const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> data(pcre2_match_data_create(1, nullptr),
                                                                                   &pcre2_match_data_free);
    const int result = pcre2_match(expression.code.get(), reinterpret_cast<PCRE2_SPTR>(module.data()), module.size(), 0,
                                   0, data.get(), context_.get());
    TORCH_CHECK(result >= 0 || result == PCRE2_ERROR_NOMATCH, "the regular expression ", quote(expression.text),
                " takes too long to match ", quote(module));
    if (result >= 0) return expression.value;
  }
  return class_;
}

CompressedTensorsConfig::CompressedTensorsConfig(const json& value, const std::string& path, size_t num_modules) {
  JsonObject config(value, path);
  const std::string version = config.text("version", "0.18.0"), format = config.text("format", "dense");
  const std::string status = config.text("quantization_status", "compressed");
  TORCH_CHECK(status == "compressed", path, ": quantization_status \"", status,
              "\" is not supported; supported is \"compressed\"");
  TORCH_CHECK(is_empty(value, "kv_cache_scheme"), path, ": kv_cache_scheme is not supported");
  TORCH_CHECK(is_empty(value, "sparsity_config") || config.object("sparsity_config").text("format", "") == "dense",
              path, ": sparsity_config is not supported");
  check_transforms(value, path);
  const std::string ignore_path = path + ": ignore";
  for (const std::string& text : config.texts("ignore")) ignored_.add(text, 0, ignore_path);

  JsonObject groups = config.object("config_groups");
  for (const auto& [name, group_value] : value.at("config_groups").items()) {
    JsonObject group = groups.object(name);
    LinearFormat result;
    for (const std::string& text : group.texts("targets")) targets_.add(text, formats_.size(), group.path());
    const std::string group_format = group.text("format", format);
    using Codes = LinearFormat::Codes;
    if (group_format == "pack-quantized") {
      result.codes = pads_words(version) ? Codes::kPadded : Codes::kPacked;
    } else {
      TORCH_CHECK(group_format == "int-quantized" || group_format == "naive-quantized", group.path(), ": format \"",
                  group_format,
                  "\" is not supported; supported are \"pack-quantized\", \"int-quantized\", \"naive-quantized\"");
      result.codes = Codes::kInt8;
    }
    TORCH_CHECK(!group.contains("output_activations"), group.path(), ": output_activations are not supported");
    if (group.contains("weights")) result.weights = read_weights(group.object("weights"));
    if (group.contains("input_activations")) {
      result.input_activations =
          read_activations(group.object("input_activations"), group_value.at("input_activations"));
    }
    formats_.push_back(std::move(result));
  }
  ignored_.limit_steps(num_modules, ignore_path);
  targets_.limit_steps(num_modules, path + ": config_groups");
}

LinearFormat CompressedTensorsConfig::format_of(const std::string& module) const {
  if (ignored_.find(module)) return {};
  const std::optional<size_t> group = targets_.find(module);
  return group ? formats_[*group] : LinearFormat{};
}

}  // namespace baseq
