#include "compressed_tensors_config.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <c10/util/Exception.h>
#include <pcre2.h>

#include <algorithm>
#include <cstdio>
#include <tuple>

#include "baseq/io/json_object.h"

namespace baseq {
namespace {

using nlohmann::json;

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
  TORCH_CHECK(dynamic == value.end() || dynamic->is_boolean(), args.path(), ": dynamic: ", dynamic->dump(),
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

ModuleTarget::ModuleTarget(std::string text, const std::string& path) : text_(std::move(text)) {
  constexpr std::string_view kPrefix = "re:";
  if (!text_.starts_with(kPrefix)) return;
  int error = 0;
  PCRE2_SIZE offset = 0;
  const auto* begin = reinterpret_cast<PCRE2_SPTR>(text_.data() + kPrefix.size());
  pcre2_code* code = pcre2_compile(begin, text_.size() - kPrefix.size(), PCRE2_ANCHORED, &error, &offset, nullptr);
  TORCH_CHECK(code != nullptr, path, ": \"", text_, "\" is not a regular expression (character ", offset, ")");
  pattern_ = std::shared_ptr<const pcre2_code>(code, [](pcre2_code* p) { pcre2_code_free(p); });
}

ModuleTarget::Match ModuleTarget::match(const std::string& module) const {
  if (!pattern_) return text_ == module ? Match::kName : text_ == "Linear" ? Match::kClass : Match::kNone;
  const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> data(
      pcre2_match_data_create_from_pattern(pattern_.get(), nullptr), &pcre2_match_data_free);
  const int result = pcre2_match(pattern_.get(), reinterpret_cast<PCRE2_SPTR>(module.data()), module.size(), 0, 0,
                                 data.get(), nullptr);
  TORCH_CHECK(result >= 0 || result == PCRE2_ERROR_NOMATCH, "the regular expression \"", text_,
              "\" takes too long to match \"", module, "\"");
  return result >= 0 ? Match::kPattern : Match::kNone;
}

CompressedTensorsConfig::CompressedTensorsConfig(const json& value, const std::string& path) {
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
  for (const std::string& text : config.texts("ignore")) ignore_.emplace_back(text, ignore_path);

  JsonObject groups = config.object("config_groups");
  for (const auto& [name, group_value] : value.at("config_groups").items()) {
    JsonObject group = groups.object(name);
    Group result;
    for (const std::string& text : group.texts("targets")) result.targets.emplace_back(text, group.path());
    const std::string group_format = group.text("format", format);
    using Codes = LinearFormat::Codes;
    if (group_format == "pack-quantized") {
      result.format.codes = pads_words(version) ? Codes::kPadded : Codes::kPacked;
    } else {
      TORCH_CHECK(group_format == "int-quantized" || group_format == "naive-quantized", group.path(), ": format \"",
                  group_format,
                  "\" is not supported; supported are \"pack-quantized\", \"int-quantized\", \"naive-quantized\"");
      result.format.codes = Codes::kInt8;
    }
    TORCH_CHECK(!group.contains("output_activations"), group.path(), ": output_activations are not supported");
    if (group.contains("weights")) result.format.weights = read_weights(group.object("weights"));
    if (group.contains("input_activations")) {
      result.format.input_activations =
          read_activations(group.object("input_activations"), group_value.at("input_activations"));
    }
    groups_.push_back(std::move(result));
  }
}

LinearFormat CompressedTensorsConfig::format_of(const std::string& module) const {
  using Match = ModuleTarget::Match;
  for (const ModuleTarget& target : ignore_) {
    if (target.match(module) != Match::kNone) return {};
  }
  Match best = Match::kNone;
  LinearFormat format;
  for (const Group& group : groups_) {
    for (const ModuleTarget& target : group.targets) {
      const Match match = target.match(module);
      if (match <= best) continue;
      best = match;
      format = group.format;
    }
  }
  return format;
}

}  // namespace baseq
