#include "formats/native/config.h"

#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <utility>

namespace baseq {
namespace {

using nlohmann::json;

const std::vector<std::string> kStrategies = {"tensor", "channel", "group", "token"};
const std::vector<std::string> kSpans = {"causal", "window"};
const std::vector<std::string> kScaleDtypes = {"float32", "float16", "bfloat16"};
constexpr at::ScalarType kScaleTypes[] = {at::kFloat, at::kHalf, at::kBFloat16};

json optional_spec(const std::optional<QuantSpec>& spec) { return spec ? to_json(*spec) : json(nullptr); }

struct Reserved {
  const char* key;
  const char* meaning;
};
constexpr Reserved kReservedBeforeOverrides[] = {{"overrides", "linears with grids of their own"}};
constexpr Reserved kReservedBeforeHead[] = {{"head", "quantized heads"}, {"embedding", "quantized embeddings"}};
constexpr Reserved kReservedInGrids[] = {{"levels", "grids with tables of levels"},
                                         {"block_scale", "grids with scales of scales"}};

void refuse_reserved(JsonObject& object, c10::ArrayRef<Reserved> reserved) {
  for (const Reserved& field : reserved) {
    object.ignore(field.key);
    TORCH_CHECK(!object.contains(field.key), object.path(), ": ", field.key, ": ", field.meaning,
                " are reserved for a later version; this program does not read them");
  }
}

std::optional<QuantSpec> read_grid(JsonObject& object, const std::string& key) {
  object.ignore(key);
  if (!object.contains(key)) return std::nullopt;
  JsonObject grid = object.object(key);
  refuse_reserved(grid, kReservedInGrids);
  return quant_spec_from_json(std::move(grid), {});
}

json runtime_to_json(const std::map<Site, RuntimeSmooth>& runtime) {
  json points = json::object();
  for (const auto& [site, smooth] : runtime) {
    points[std::string(site_info(site).point)] = {{"group", smooth.group},
                                                  {"span", kSpans[static_cast<size_t>(smooth.span)]}};
  }
  return points;
}

std::map<Site, RuntimeSmooth> runtime_from_json(JsonObject points) {
  std::map<Site, RuntimeSmooth> runtime;
  for (const SiteInfo& info : sites()) {
    if (!info.is_input() || !points.contains(info.point)) continue;
    JsonObject fields = points.object(info.point);
    RuntimeSmooth& smooth = runtime[info.site];
    smooth.group = fields.integer("group", smooth.group, 1, int64_t{1} << 30);
    smooth.span = static_cast<RuntimeSmooth::Span>(fields.choice("span", static_cast<size_t>(smooth.span), kSpans));
    fields.finish();
  }
  points.finish();
  return runtime;
}

/// `online_hadamard` of versions 3 and 4.
std::vector<Site> hadamards_of_flags(JsonObject flags) {
  const std::pair<const char*, std::vector<Site>> all[] = {{"input", {Site::kQkv, Site::kGateUp}},
                                                           {"query_key", {Site::kQueryKey}},
                                                           {"o", {Site::kO}},
                                                           {"down", {Site::kDown}}};
  std::vector<Site> result;
  for (const auto& [key, at] : all) {
    if (flags.boolean(key, false)) result.insert(result.end(), at.begin(), at.end());
  }
  flags.finish();
  return result;
}

}  // namespace

json to_json(const QuantSpec& spec) {
  const auto dtype = std::find(std::begin(kScaleTypes), std::end(kScaleTypes), spec.scale_dtype);
  TORCH_CHECK(dtype != std::end(kScaleTypes), "scale_dtype is ", spec.scale_dtype,
              ", expected float32, float16 or bfloat16");
  json result{{"num_bits", spec.num_bits},
              {"symmetric", spec.symmetric},
              {"strategy", kStrategies[static_cast<size_t>(spec.strategy)]},
              {"dynamic", spec.dynamic},
              {"scale_dtype", kScaleDtypes[dtype - std::begin(kScaleTypes)]}};
  if (spec.strategy == Strategy::kGroup) result["group_size"] = spec.group_size;
  return result;
}

QuantSpec quant_spec_from_json(JsonObject object, const QuantSpec& fallback) {
  QuantSpec spec = fallback;
  spec.num_bits = object.integer("num_bits", spec.num_bits, 2, 8);
  spec.symmetric = object.boolean("symmetric", spec.symmetric);
  spec.strategy = static_cast<Strategy>(object.choice("strategy", static_cast<size_t>(spec.strategy), kStrategies));
  if (spec.strategy != Strategy::kGroup) spec.group_size = 0;  // that of `fallback`
  spec.group_size = object.integer("group_size", spec.group_size, 1, int64_t{1} << 30);
  spec.dynamic = object.boolean("dynamic", spec.dynamic);
  const auto dtype = std::find(std::begin(kScaleTypes), std::end(kScaleTypes), fallback.scale_dtype);
  spec.scale_dtype = kScaleTypes[object.choice("scale_dtype", dtype - std::begin(kScaleTypes), kScaleDtypes)];
  TORCH_CHECK((spec.strategy == Strategy::kGroup) == (spec.group_size > 0), object.path(),
              ": group_size goes with strategy \"group\" and only with it");
  object.finish();
  return spec;
}

json to_json(const QuantizationConfig& config) {
  json result{{"quant_method", QuantizationConfig::kMethod},
              {"format_version", QuantizationConfig::kFirstWithTransforms},
              {"weights", optional_spec(config.weights)},
              {"lora_rank", config.lora_rank},
              {"input_activations", optional_spec(config.input_activations)},
              {"kv_cache", optional_spec(config.kv_cache)}};
  if (config.head || config.embedding) {
    result["format_version"] = QuantizationConfig::kFirstWithHead;
    result["head"] = optional_spec(config.head);
    result["embedding"] = optional_spec(config.embedding);
  }
  if (!config.overrides.empty()) {
    result["format_version"] = QuantizationConfig::kFirstWithOverrides;
    for (const auto& [linear, grid] : config.overrides) result["overrides"][linear] = optional_spec(grid);
  }
  if (!config.runtime.empty()) {
    result["format_version"] = QuantizationConfig::kFirstWithRuntime;
    result["runtime_smooth"] = runtime_to_json(config.runtime);
    result["head"] = optional_spec(config.head);
    result["embedding"] = optional_spec(config.embedding);
  }
  return result;
}

QuantizationConfig quantization_config_from_json(const json& value, const std::string& path) {
  JsonObject object(value, path);
  const std::string method = object.text("quant_method", "");
  TORCH_CHECK(
      method == QuantizationConfig::kMethod, path, ": quant_method is \"", method,
      "\": the checkpoint is already quantized; quantize the original one in float32, float16 or bfloat16 instead (\"",
      QuantizationConfig::kMethod, "\", \"compressed-tensors\", \"gptq\" and \"awq\" can be evaluated and exported)");
  const int64_t version = object.integer("format_version", 0, 0, INT64_MAX);
  TORCH_CHECK(version >= QuantizationConfig::kOldestFormatVersion && version <= QuantizationConfig::kFormatVersion,
              path, ": format_version ", version, " is not supported; this program reads versions ",
              QuantizationConfig::kOldestFormatVersion, " to ", QuantizationConfig::kFormatVersion);
  QuantizationConfig config{.format_version = version};
  config.weights = read_grid(object, "weights");
  config.lora_rank = object.integer("lora_rank", 0, 0, INT64_MAX);
  TORCH_CHECK(config.weights || config.lora_rank == 0, path, ": lora_rank is ", config.lora_rank,
              " but weights are in full precision");
  config.input_activations = read_grid(object, "input_activations");
  config.kv_cache = read_grid(object, "kv_cache");
  if (version < QuantizationConfig::kFirstWithHead) {
    refuse_reserved(object, kReservedBeforeHead);
  } else {
    config.head = read_grid(object, "head");
    config.embedding = read_grid(object, "embedding");
  }
  if (version < QuantizationConfig::kFirstWithOverrides) {
    refuse_reserved(object, kReservedBeforeOverrides);
  } else if (object.contains("overrides")) {
    JsonObject overrides = object.object("overrides");
    TORCH_CHECK(config.weights, overrides.path(), ": weights are in full precision; there is no grid to replace");
    for (const std::string& linear : overrides.keys()) config.overrides[linear] = read_grid(overrides, linear);
    config.uniform = config.overrides.empty();
  }
  object.ignore("overrides");
  if (version >= QuantizationConfig::kFirstWithRuntime && object.contains("runtime_smooth")) {
    config.runtime = runtime_from_json(object.object("runtime_smooth"));
    TORCH_CHECK(config.input_activations, path, ": runtime_smooth without input_activations");
  }
  if (version < QuantizationConfig::kFirstWithTransforms) {
    config.hadamards = hadamards_of_flags(object.object("online_hadamard"));
  }
  object.ignore("recipe");
  object.ignore("baseq_version");
  object.finish();
  return config;
}

}  // namespace baseq
