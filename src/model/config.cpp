#include "baseq/model/config.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "io/json_object.h"

namespace baseq {
namespace {

using nlohmann::json;

/// Sizes beyond these are a broken file, not a model: the largest known have 53248 features in a layer and 126 layers.
/// With them the bytes of all blocks and of their moments fit in 64 bits.
constexpr int64_t kMaxSize = int64_t{1} << 30;
constexpr int64_t kMaxFeatures = int64_t{1} << 20;
constexpr int64_t kMaxLayers = int64_t{1} << 12;
constexpr double kMaxMultiplier = 1e9;

/// What the configuration class of an architecture in transformers says where config.json is silent, and which of the
/// fields that all share it looks at.
struct Family {
  const char* name;
  int64_t num_key_value_heads = 0;  ///< 0: num_attention_heads
  int64_t head_dim = 0;             ///< 0: hidden_size / num_attention_heads
  int64_t max_position_embeddings = 2048;
  double rms_norm_eps = 1e-6;
  double rope_theta = 10000.0;
  bool tie_word_embeddings = false;
  enum class Bias { kNone, kQkv, kAttention, kAll } bias = Bias::kNone;  ///< kAttention, kAll: if the config asks
  enum class Window { kNone, kEveryLayer, kLayerTypes } window = Window::kNone;
  int64_t sliding_window = 0;
  bool qk_norm = false;
  bool fused_projections = false;
  bool partial_rotary = false;
  bool longrope = false;  ///< and no other scaling; "su" and "yarn" are old names of it
  bool layers_without_rope = false;
  bool multipliers = false;
};

const std::vector<Family>& families() {
  using Bias = Family::Bias;
  using Window = Family::Window;
  static const std::vector<Family> all = {
      {.name = "LlamaForCausalLM", .bias = Bias::kAll},
      {.name = "MistralForCausalLM",
       .num_key_value_heads = 8,
       .max_position_embeddings = 131072,
       .window = Window::kEveryLayer,
       .sliding_window = 4096},
      {.name = "Qwen2ForCausalLM",
       .num_key_value_heads = 32,
       .max_position_embeddings = 32768,
       .bias = Bias::kQkv,
       .window = Window::kLayerTypes,
       .sliding_window = 4096},
      {.name = "Qwen3ForCausalLM",
       .num_key_value_heads = 32,
       .head_dim = 128,
       .max_position_embeddings = 32768,
       .bias = Bias::kAttention,
       .window = Window::kLayerTypes,
       .sliding_window = 4096,
       .qk_norm = true},
      {.name = "Phi3ForCausalLM",
       .max_position_embeddings = 4096,
       .rms_norm_eps = 1e-5,
       .window = Window::kEveryLayer,
       .fused_projections = true,
       .partial_rotary = true,
       .longrope = true},
      {.name = "SmolLM3ForCausalLM",
       .num_key_value_heads = 4,
       .max_position_embeddings = 32768,
       .rope_theta = 2000000.0,
       .tie_word_embeddings = true,
       .bias = Bias::kAll,
       .window = Window::kLayerTypes,
       .layers_without_rope = true},
      {.name = "GraniteForCausalLM", .bias = Bias::kAll, .multipliers = true},
  };
  return all;
}

const Family& find_family(JsonObject& config) {
  const auto architectures = config.texts("architectures");
  TORCH_CHECK(architectures.size() == 1, config.path(), ": architectures: expected one name, got ",
              architectures.size());
  std::vector<std::string> names;
  for (const Family& family : families()) {
    if (family.name == architectures[0]) return family;
    names.push_back(family.name);
  }
  TORCH_CHECK(false, config.path(), ": architectures: \"", architectures[0], "\" is not supported; supported are ",
              fmt::format("{}", fmt::join(names, ", ")), ": name one of these if it computes the same");
}

int64_t size_field(JsonObject& config, const char* key, int64_t fallback = -1, int64_t max = kMaxSize) {
  const int64_t size = config.integer(key, fallback, 1, max);
  TORCH_CHECK(size > 0, config.path(), ": ", key, ": missing; a positive integer is required");
  return size;
}

double required_number(JsonObject& object, const char* key, double min, double max) {
  TORCH_CHECK(object.contains(key), object.path(), ": ", key, ": missing; a number is required");
  return object.number(key, 0.0, min, max);
}

std::optional<double> optional_number(JsonObject& object, const char* key, double min, double max) {
  if (!object.contains(key)) return std::nullopt;
  return object.number(key, 0.0, min, max);
}

/// The scaling's name in `rope`; transformers 4 and 5 settle a contradiction between the two keys differently.
std::string rope_type(JsonObject& rope) {
  const std::string old_key = rope.text("type", ""), key = rope.text("rope_type", old_key);
  TORCH_CHECK(old_key.empty() || old_key == key, rope.path(), ": type \"", old_key, "\" contradicts rope_type \"", key,
              "\"");
  return key.empty() ? "default" : key;
}

std::vector<double> longrope_divisors(JsonObject& rope, const char* key, size_t count) {
  const std::vector<double> divisors = rope.numbers(key, 1e-6, 1e6);
  TORCH_CHECK(divisors.size() == count, rope.path(), ": ", key, ": expected ", count, " numbers, got ",
              divisors.size());
  return divisors;
}

void read_scaling(JsonObject& config, JsonObject rope, const Family& family, ModelConfig& model) {
  using Type = RopeParameters::Type;
  constexpr double kMaxFactor = 1e6;
  RopeParameters& result = model.rope;
  result.theta = rope.number("rope_theta", result.theta, 1.0, 1e12);
  result.partial_rotary_factor = rope.number("partial_rotary_factor", result.partial_rotary_factor, 0.0, 1.0);
  const std::string name = rope_type(rope);
  if (name == "default") return;
  using Names = std::vector<std::pair<std::string, Type>>;
  const Names names = family.longrope
                          ? Names{{"longrope", Type::kLongrope}, {"su", Type::kLongrope}, {"yarn", Type::kLongrope}}
                          : Names{{"linear", Type::kLinear},
                                  {"dynamic", Type::kDynamic},
                                  {"llama3", Type::kLlama3},
                                  {"yarn", Type::kYarn}};
  const auto found = std::find_if(names.begin(), names.end(), [&](const auto& item) { return item.first == name; });
  std::vector<std::string> known{"default"};
  for (const auto& [known_name, type] : names) known.push_back(known_name);
  TORCH_CHECK(found != names.end(), rope.path(), ": rope_type \"", name, "\" is not supported for ", family.name,
              "; supported are \"", fmt::format("{}", fmt::join(known, "\", \"")), "\"");
  result.type = found->second;
  if (result.type == Type::kLongrope) {
    constexpr int64_t kTrainedLength = 4096;  // of Phi3Config
    const int64_t top_level = config.integer("original_max_position_embeddings", kTrainedLength, 2, kMaxSize);
    result.original_max_position_embeddings = rope.integer("original_max_position_embeddings", top_level, 2, kMaxSize);
    result.factor = static_cast<double>(model.max_position_embeddings) /
                    static_cast<double>(result.original_max_position_embeddings);
    result.attention_factor = optional_number(rope, "attention_factor", 0.0, kMaxFactor);
    const auto dim = static_cast<double>(model.head_dim) * result.partial_rotary_factor;
    const auto count = static_cast<size_t>(dim) / 2;
    result.short_factor = longrope_divisors(rope, "short_factor", count);
    result.long_factor = longrope_divisors(rope, "long_factor", count);
    return;
  }
  result.factor = required_number(rope, "factor", 1.0, kMaxFactor);
  result.original_max_position_embeddings =
      rope.integer("original_max_position_embeddings", model.max_position_embeddings, 1, kMaxSize);
  if (result.type == Type::kDynamic) {
    TORCH_CHECK(model.head_dim > 2, rope.path(), ": rope_type \"dynamic\" needs a head_dim above 2");
  } else if (result.type == Type::kLlama3) {
    required_number(rope, "original_max_position_embeddings", 1, kMaxSize);
    result.low_freq_factor = required_number(rope, "low_freq_factor", 1e-6, kMaxFactor);
    result.high_freq_factor = required_number(rope, "high_freq_factor", 1e-6, kMaxFactor);
    TORCH_CHECK(result.high_freq_factor > result.low_freq_factor, rope.path(), ": high_freq_factor ",
                result.high_freq_factor, " is not above low_freq_factor ", result.low_freq_factor);
  } else if (result.type == Type::kYarn) {
    result.attention_factor = optional_number(rope, "attention_factor", 0.0, kMaxFactor);
    result.mscale = optional_number(rope, "mscale", 0.0, kMaxFactor);
    result.mscale_all_dim = optional_number(rope, "mscale_all_dim", 0.0, kMaxFactor);
    result.beta_fast = rope.number("beta_fast", result.beta_fast, 1e-6, kMaxFactor);
    result.beta_slow = rope.number("beta_slow", result.beta_slow, 1e-6, kMaxFactor);
    result.truncate = rope.boolean("truncate", result.truncate);
  }
}

/// `rope_scaling`, or `rope_parameters` as transformers 5 spells it.
void read_rope(JsonObject& config, const json& value, const Family& family, ModelConfig& model) {
  RopeParameters& rope = model.rope;
  rope.theta = config.number("rope_theta", family.rope_theta, 1.0, 1e12);
  rope.partial_rotary_factor = config.number("partial_rotary_factor", 1.0, 0.0, 1.0);
  const bool old_key = config.contains("rope_scaling"), new_key = config.contains("rope_parameters");
  TORCH_CHECK(!old_key || !new_key || value.at("rope_scaling") == value.at("rope_parameters"), config.path(),
              ": rope_scaling and rope_parameters differ; keep one of them");
  if (old_key || new_key) {
    const char* key = new_key ? "rope_parameters" : "rope_scaling";
    for (const auto& [name, item] : value.at(key).items()) {
      TORCH_CHECK(!item.is_object(), config.path(), ": ", key, ": \"", name,
                  "\" is an object, but a rotary embedding for each layer type is not supported");
    }
    const double outside = rope.theta;
    read_scaling(config, config.object(key), family, model);
    // transformers 4 looks past a rope_theta in rope_scaling, 5 does not.
    TORCH_CHECK(new_key || rope.theta == outside, config.path(), ": rope_scaling: rope_theta ", rope.theta,
                " contradicts the rope_theta ", outside, " beside it");
  }
  TORCH_CHECK(family.partial_rotary || rope.partial_rotary_factor == 1, config.path(), ": partial_rotary_factor ",
              rope.partial_rotary_factor, " is not supported for ", family.name, "; expected 1");
  const auto dim = static_cast<int64_t>(static_cast<double>(model.head_dim) * rope.partial_rotary_factor);
  TORCH_CHECK(dim > 0 && dim % 2 == 0, config.path(), ": head_dim ", model.head_dim, " turns ", dim,
              " features; rotary embeddings need pairs");
}

/// Which blocks turn q and k, and how far each sees.
void read_blocks(JsonObject& config, const json& value, const Family& family, ModelConfig& model) {
  const auto count = static_cast<size_t>(model.num_hidden_layers);
  model.blocks.assign(count, {});
  if (family.layers_without_rope) {
    const auto interval = static_cast<size_t>(config.integer("no_rope_layer_interval", 4, 1, kMaxSize));
    const std::vector<double> listed = config.numbers("no_rope_layers", 0, 1);
    TORCH_CHECK(!config.contains("no_rope_layers") || listed.size() == count, config.path(),
                ": no_rope_layers: expected ", count, " numbers, got ", listed.size());
    for (size_t i = 0; i < count; ++i) model.blocks[i].rope = listed.empty() ? (i + 1) % interval != 0 : listed[i] != 0;
  }
  using Window = Family::Window;
  if (family.window == Window::kNone) return;
  const bool every_layer = family.window == Window::kEveryLayer;
  const bool used = !every_layer && config.boolean("use_sliding_window", false);
  int64_t window = 0;
  // Qwen's configs name a window that use_sliding_window turns off; SmolLM3's layer_types look past that switch.
  if (every_layer || used || family.layers_without_rope) {
    // A null is a model without a window, unlike a missing key.
    const int64_t fallback = value.contains("sliding_window") ? 0 : family.sliding_window;
    window = config.contains("sliding_window") ? size_field(config, "sliding_window") : fallback;
  }
  if (every_layer) {
    for (auto& block : model.blocks) block.sliding_window = window;
    return;
  }
  const std::vector<std::string> types = config.texts("layer_types");
  TORCH_CHECK(!config.contains("layer_types") || types.size() == count, config.path(), ": layer_types: expected ",
              count, " names, got ", types.size());
  const auto first_window = static_cast<size_t>(config.integer("max_window_layers", 28, 0, kMaxSize));
  for (size_t i = 0; i < count; ++i) {
    bool sliding = used && window > 0 && (family.layers_without_rope ? !model.blocks[i].rope : i >= first_window);
    if (!types.empty()) {
      sliding = types[i] == "sliding_attention";
      TORCH_CHECK(sliding || types[i] == "full_attention", config.path(), ": layer_types: \"", types[i],
                  "\" is not supported; supported are \"full_attention\", \"sliding_attention\"");
      TORCH_CHECK(!sliding || window > 0, config.path(), ": layer_types: \"", types[i],
                  "\" needs a sliding_window and use_sliding_window");
    }
    if (sliding) model.blocks[i].sliding_window = window;
  }
}

void read_attention_sizes(JsonObject& config, const json& value, const Family& family, ModelConfig& model) {
  model.num_attention_heads = size_field(config, "num_attention_heads", -1, kMaxFeatures);
  // A null is one key/value head a query head, unlike a missing key.
  const bool absent = !value.contains("num_key_value_heads") && family.num_key_value_heads > 0;
  model.num_key_value_heads =
      size_field(config, "num_key_value_heads", absent ? family.num_key_value_heads : model.num_attention_heads);
  TORCH_CHECK(model.num_attention_heads % model.num_key_value_heads == 0, config.path(), ": num_attention_heads ",
              model.num_attention_heads, " is not a multiple of num_key_value_heads ", model.num_key_value_heads);
  int64_t head_dim = family.head_dim;
  if (!config.contains("head_dim") && head_dim == 0) {
    TORCH_CHECK(model.hidden_size % model.num_attention_heads == 0, config.path(), ": hidden_size ", model.hidden_size,
                " is not a multiple of num_attention_heads ", model.num_attention_heads);
    head_dim = model.hidden_size / model.num_attention_heads;
  }
  model.head_dim = size_field(config, "head_dim", head_dim, kMaxFeatures);
  TORCH_CHECK(model.num_attention_heads * model.head_dim <= kMaxFeatures, config.path(), ": num_attention_heads ",
              model.num_attention_heads, " times head_dim ", model.head_dim, " are ",
              model.num_attention_heads * model.head_dim, " features, expected at most ", kMaxFeatures);
}

void read_multipliers(JsonObject& config, ModelConfig& model) {
  const auto multiplier = [&](const char* key) { return config.number(key, 1.0, 1 / kMaxMultiplier, kMaxMultiplier); };
  model.embedding_multiplier = multiplier("embedding_multiplier");
  model.residual_multiplier = multiplier("residual_multiplier");
  model.attention_multiplier = multiplier("attention_multiplier");
  model.logits_scaling = multiplier("logits_scaling");
}

}  // namespace

ModelConfig ModelConfig::from_json(const nlohmann::json& value, const std::string& path) {
  JsonObject config(value, path);
  const Family& family = find_family(config);
  const std::string activation = config.text("hidden_act", "silu");
  TORCH_CHECK(activation == "silu", path, ": hidden_act \"", activation, "\" is not supported; supported is \"silu\"");

  ModelConfig model;
  model.architecture = family.name;
  model.hidden_size = size_field(config, "hidden_size", -1, kMaxFeatures);
  model.intermediate_size = size_field(config, "intermediate_size", -1, kMaxFeatures);
  model.num_hidden_layers = size_field(config, "num_hidden_layers");
  TORCH_CHECK(model.num_hidden_layers <= kMaxLayers, path, ": num_hidden_layers: expected at most ", kMaxLayers,
              ", got ", model.num_hidden_layers);
  model.vocab_size = size_field(config, "vocab_size");
  model.max_position_embeddings = size_field(config, "max_position_embeddings", family.max_position_embeddings);
  read_attention_sizes(config, value, family, model);
  model.rms_norm_eps = config.number("rms_norm_eps", family.rms_norm_eps, 0.0, 1.0);
  read_rope(config, value, family, model);
  read_blocks(config, value, family, model);
  using Bias = Family::Bias;
  if (family.bias == Bias::kAttention || family.bias == Bias::kAll) {
    model.attention_bias = model.o_bias = config.boolean("attention_bias", false);
  }
  if (family.bias == Bias::kQkv) model.attention_bias = true;
  if (family.bias == Bias::kAll) model.mlp_bias = config.boolean("mlp_bias", false);
  model.qk_norm = family.qk_norm;
  model.fused_projections = family.fused_projections;
  model.tie_word_embeddings = config.boolean("tie_word_embeddings", family.tie_word_embeddings);
  if (family.multipliers) read_multipliers(config, model);
  return model;
}

}  // namespace baseq
