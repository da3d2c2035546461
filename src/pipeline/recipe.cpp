#include "baseq/pipeline/recipe.h"

#include <c10/util/Exception.h>

#include <algorithm>

namespace baseq {
namespace {

using nlohmann::json;

constexpr double kMaxClip = 1.0;
const std::vector<std::string> kRoundings = {"rtn", "gptq"};
const std::vector<std::string> kDtypes = {"float32", "float16", "bfloat16"};
constexpr at::ScalarType kDtypeValues[] = {at::kFloat, at::kHalf, at::kBFloat16};

/// Activation grids are dynamic; a recipe gives their bits, symmetry and clip.
Recipe::Activations read_activations(JsonObject object, const QuantSpec& base) {
  Recipe::Activations result{.spec = base};
  result.spec.num_bits = object.integer("num_bits", 4, 2, 8);
  result.spec.symmetric = object.boolean("symmetric", false);
  result.clip = object.number("clip", 1.0, 0.01, kMaxClip);
  object.finish();
  return result;
}

json write_activations(const std::optional<Recipe::Activations>& activations) {
  if (!activations) return nullptr;
  return {{"num_bits", activations->spec.num_bits},
          {"symmetric", activations->spec.symmetric},
          {"clip", activations->clip}};
}

void read_rounding(JsonObject object, Recipe& recipe) {
  recipe.rounding = static_cast<Recipe::Rounding>(object.choice("method", 0, kRoundings));
  recipe.gptq.mse_clip = object.boolean("mse_clip", recipe.gptq.mse_clip);
  recipe.gptq.search.norm = object.number("mse_norm", recipe.gptq.search.norm, 1.0, 8.0);
  recipe.gptq.block_size = object.integer("block_size", recipe.gptq.block_size, 1, 1 << 20);
  recipe.gptq.damping = object.number("damping", recipe.gptq.damping, 0.0, 1.0);
  recipe.gptq.activation_order = object.boolean("activation_order", recipe.gptq.activation_order);
  recipe.gptq.static_groups = object.boolean("static_groups", recipe.gptq.static_groups);
  recipe.compensate_streams = object.boolean("compensate_streams", recipe.compensate_streams);
  recipe.quantized_inputs = object.boolean("quantized_inputs", recipe.quantized_inputs);
  recipe.hessian_shrinkage = object.number("hessian_shrinkage", recipe.hessian_shrinkage, 0.0, 1.0);
  object.finish();
}

void read_transforms(JsonObject object, Recipe::Transforms& transforms) {
  const std::vector<std::string> kinds = {"none", "hadamard"};
  transforms.residual = object.choice("residual", 0, kinds) == 1;
  transforms.value = object.choice("value", 0, kinds) == 1;
  transforms.query_key = object.choice("query_key", 0, kinds) == 1;
  transforms.down = object.choice("down", 0, kinds) == 1;
  object.finish();
}

}  // namespace

Recipe Recipe::from_json(const json& value, const std::string& path) {
  JsonObject object(value, path);
  Recipe recipe;
  recipe.name = object.text("name", "");
  const auto with = [&](const char* key, auto&& read) {
    object.ignore(key);
    if (object.contains(key)) read(object.object(key));
  };
  with("weights", [&](JsonObject weights) { recipe.weights = quant_spec_from_json(std::move(weights), {}); });
  TORCH_CHECK(!recipe.weights || (!recipe.weights->dynamic && recipe.weights->strategy != Strategy::kToken), path,
              ": weights: expected strategy \"tensor\", \"channel\" or \"group\" and a static grid");
  with("rounding", [&](JsonObject rounding) { read_rounding(std::move(rounding), recipe); });
  with("input_activations", [&](JsonObject activations) {
    recipe.input_activations =
        read_activations(std::move(activations), {.strategy = Strategy::kToken, .dynamic = true});
  });
  with("kv_cache", [&](JsonObject cache) {
    // The group is a head; its size is the model's head_dim and filled in when that is known.
    recipe.kv_cache = read_activations(std::move(cache), {.strategy = Strategy::kGroup, .dynamic = true});
  });
  with("transforms", [&](JsonObject transforms) { read_transforms(std::move(transforms), recipe.transforms); });
  with("calibration", [&](JsonObject calibration) {
    recipe.num_samples = calibration.integer("num_samples", recipe.num_samples, 1, 1 << 24);
    recipe.seq_len = calibration.integer("seq_len", recipe.seq_len, 2, 1 << 24);
    calibration.finish();
  });
  if (object.contains("dtype")) recipe.dtype = kDtypeValues[object.choice("dtype", 0, kDtypes)];
  object.ignore("dtype");
  object.finish();
  return recipe;
}

json Recipe::to_json() const {
  const auto kind = [](bool hadamard) { return hadamard ? "hadamard" : "none"; };
  json result{{"name", name},
              {"weights", weights ? baseq::to_json(*weights) : json(nullptr)},
              {"rounding",
               {{"method", kRoundings[static_cast<size_t>(rounding)]},
                {"mse_clip", gptq.mse_clip},
                {"mse_norm", gptq.search.norm},
                {"block_size", gptq.block_size},
                {"damping", gptq.damping},
                {"activation_order", gptq.activation_order},
                {"static_groups", gptq.static_groups},
                {"compensate_streams", compensate_streams},
                {"quantized_inputs", quantized_inputs},
                {"hessian_shrinkage", hessian_shrinkage}}},
              {"input_activations", write_activations(input_activations)},
              {"kv_cache", write_activations(kv_cache)},
              {"transforms",
               {{"residual", kind(transforms.residual)},
                {"value", kind(transforms.value)},
                {"query_key", kind(transforms.query_key)},
                {"down", kind(transforms.down)}}},
              {"calibration", {{"num_samples", num_samples}, {"seq_len", seq_len}}},
              {"dtype", nullptr}};
  if (dtype)
    result["dtype"] = kDtypes[std::find(std::begin(kDtypeValues), std::end(kDtypeValues), *dtype) - kDtypeValues];
  return result;
}

bool Recipe::needs_calibration() const { return weights && rounding == Rounding::kGptq; }

QuantizationConfig Recipe::quantization_config() const {
  QuantizationConfig config{.weights = weights};
  if (input_activations) config.input_activations = input_activations->spec;
  if (kv_cache) config.kv_cache = kv_cache->spec;
  config.query_key_hadamard = transforms.query_key;
  config.down_hadamard = transforms.down;
  return config;
}

void override_recipe(json& recipe, const std::string& path, const std::string& text) {
  json* value = &recipe;
  size_t begin = 0;
  for (;;) {
    const size_t dot = path.find('.', begin);
    const std::string key = path.substr(begin, dot - begin);
    TORCH_CHECK(!key.empty(), "recipe override: \"", path, "\" is not a dotted path of keys");
    TORCH_CHECK(value->is_object() || value->is_null(), "recipe override: \"", path, "\" passes through a value");
    value = &(*value)[key];
    if (dot == std::string::npos) break;
    begin = dot + 1;
  }
  const json parsed = json::parse(text, nullptr, /*allow_exceptions=*/false);
  *value = parsed.is_discarded() ? json(text) : parsed;
}

}  // namespace baseq
