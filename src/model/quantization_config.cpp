#include "baseq/model/quantization_config.h"

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

namespace baseq {
namespace {

using nlohmann::json;

const std::vector<std::string> kStrategies = {"tensor", "channel", "group", "token"};
const std::vector<std::string> kScaleDtypes = {"float32", "float16", "bfloat16"};
constexpr at::ScalarType kScaleTypes[] = {at::kFloat, at::kHalf, at::kBFloat16};

json optional_spec(const std::optional<QuantSpec>& spec) { return spec ? to_json(*spec) : json(nullptr); }

}  // namespace

json to_json(const QuantSpec& spec) {
  const auto dtype = std::find(std::begin(kScaleTypes), std::end(kScaleTypes), spec.scale_dtype);
  TORCH_INTERNAL_ASSERT(dtype != std::end(kScaleTypes));
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
  spec.group_size = object.integer("group_size", spec.group_size, 1, int64_t{1} << 30);
  spec.dynamic = object.boolean("dynamic", spec.dynamic);
  spec.scale_dtype = kScaleTypes[object.choice("scale_dtype", 0, kScaleDtypes)];
  TORCH_CHECK((spec.strategy == Strategy::kGroup) == (spec.group_size > 0), object.path(),
              ": group_size goes with strategy \"group\" and only with it");
  object.finish();
  return spec;
}

bool QuantizationConfig::hadamard_at(Site site) const {
  switch (site) {
    case Site::kQkv:
    case Site::kGateUp:
      return input_hadamard;
    case Site::kQueryKey:
      return query_key_hadamard;
    case Site::kO:
      return o_hadamard;
    case Site::kDown:
      return down_hadamard;
    case Site::kResidual:
    case Site::kValue:
      return false;
  }
  TORCH_INTERNAL_ASSERT(false, "unknown Site");
}

json to_json(const QuantizationConfig& config) {
  const json online{{"input", config.input_hadamard},
                    {"query_key", config.query_key_hadamard},
                    {"o", config.o_hadamard},
                    {"down", config.down_hadamard}};
  return {{"quant_method", QuantizationConfig::kMethod},
          {"format_version", QuantizationConfig::kFormatVersion},
          {"weights", optional_spec(config.weights)},
          {"lora_rank", config.lora_rank},
          {"input_activations", optional_spec(config.input_activations)},
          {"kv_cache", optional_spec(config.kv_cache)},
          {"online_hadamard", online}};
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
  QuantizationConfig config;
  const auto read_spec = [&](const char* key) -> std::optional<QuantSpec> {
    object.ignore(key);
    if (!object.contains(key)) return std::nullopt;
    return quant_spec_from_json(object.object(key), {});
  };
  config.weights = read_spec("weights");
  config.lora_rank = object.integer("lora_rank", 0, 0, INT64_MAX);
  TORCH_CHECK(config.weights || config.lora_rank == 0, path, ": lora_rank is ", config.lora_rank,
              " but weights are in full precision");
  config.input_activations = read_spec("input_activations");
  config.kv_cache = read_spec("kv_cache");
  JsonObject online = object.object("online_hadamard");
  config.input_hadamard = online.boolean("input", false);
  config.query_key_hadamard = online.boolean("query_key", false);
  config.o_hadamard = online.boolean("o", false);
  config.down_hadamard = online.boolean("down", false);
  online.finish();
  object.ignore("recipe");
  object.ignore("baseq_version");
  object.finish();
  return config;
}

}  // namespace baseq
