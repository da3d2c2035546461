#include "baseq/model/config.h"

#include <gtest/gtest.h>

#include "../tiny_model.h"
#include "formats/native/config.h"

namespace baseq {
namespace {

using nlohmann::json;
using test::expect_error;

json with(const std::string& key, const json& value) {
  json config = test::tiny_config({});
  config[key] = value;
  return config;
}

void expect_refused(const json& config, const std::vector<std::string>& parts) {
  expect_error([&] { ModelConfig::from_json(config, "dir/config.json"); }, parts);
}

TEST(ModelConfig, ReadsEveryField) {
  const json config = test::tiny_config({.num_heads = 3, .num_kv_heads = 1, .bias = true, .tied = false});
  const ModelConfig model = ModelConfig::from_json(config, "config.json");
  EXPECT_EQ(model.architecture, "LlamaForCausalLM");
  EXPECT_EQ(model.hidden_size, 32);
  EXPECT_EQ(model.intermediate_size, 48);
  EXPECT_EQ(model.num_hidden_layers, 2);
  EXPECT_EQ(model.num_attention_heads, 3);
  EXPECT_EQ(model.num_key_value_heads, 1);
  EXPECT_EQ(model.head_dim, 8);
  EXPECT_EQ(model.vocab_size, 40);
  EXPECT_DOUBLE_EQ(model.rms_norm_eps, 1e-5);
  EXPECT_DOUBLE_EQ(model.rope.theta, 10000.0);
  EXPECT_TRUE(model.attention_bias);
  EXPECT_TRUE(model.o_bias);
  EXPECT_TRUE(model.mlp_bias);
  EXPECT_FALSE(model.tie_word_embeddings);
}

TEST(ModelConfig, MissingSizesAreNamed) {
  for (const char* key :
       {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}) {
    json config = test::tiny_config({});
    config.erase(key);
    expect_refused(config, {"dir/config.json", key, "missing"});
  }
  json config = test::tiny_config({});
  config.erase("architectures");
  expect_refused(config, {"architectures"});
}

TEST(ModelConfig, OptionalSizesFollowFromTheOthers) {
  json config = test::tiny_config({.num_kv_heads = 4});
  config.erase("head_dim");
  config.erase("num_key_value_heads");
  const ModelConfig model = ModelConfig::from_json(config, "config.json");
  EXPECT_EQ(model.head_dim, 8);
  EXPECT_EQ(model.num_key_value_heads, 4);
}

/// A config with only the sizes that all architectures require.
json minimal(const char* architecture) {
  return {{"architectures", {architecture}}, {"hidden_size", 4096},    {"intermediate_size", 64},
          {"num_attention_heads", 32},       {"num_hidden_layers", 4}, {"vocab_size", 40}};
}

ModelConfig read(const json& config) { return ModelConfig::from_json(config, "config.json"); }

TEST(ModelConfig, SilenceMeansWhatTheArchitectureSaysInTransformers) {
  struct Defaults {
    const char* architecture;
    int64_t num_key_value_heads, max_position_embeddings, window;
    double rms_norm_eps, rope_theta;
    bool tied, qkv_bias, qk_norm, fused;
  };
  for (const Defaults& expected :
       {Defaults{"LlamaForCausalLM", 32, 2048, 0, 1e-6, 1e4, false, false, false, false},
        Defaults{"MistralForCausalLM", 8, 131072, 4096, 1e-6, 1e4, false, false, false, false},
        Defaults{"Qwen2ForCausalLM", 32, 32768, 0, 1e-6, 1e4, false, true, false, false},
        Defaults{"Qwen3ForCausalLM", 32, 32768, 0, 1e-6, 1e4, false, false, true, false},
        Defaults{"Phi3ForCausalLM", 32, 4096, 0, 1e-5, 1e4, false, false, false, true},
        Defaults{"SmolLM3ForCausalLM", 4, 32768, 0, 1e-6, 2e6, true, false, false, false},
        Defaults{"GraniteForCausalLM", 32, 2048, 0, 1e-6, 1e4, false, false, false, false}}) {
    SCOPED_TRACE(expected.architecture);
    const ModelConfig model = read(minimal(expected.architecture));
    EXPECT_EQ(model.num_key_value_heads, expected.num_key_value_heads);
    EXPECT_EQ(model.head_dim, 128);
    EXPECT_EQ(model.max_position_embeddings, expected.max_position_embeddings);
    EXPECT_EQ(model.rms_norm_eps, expected.rms_norm_eps);
    EXPECT_EQ(model.rope.theta, expected.rope_theta);
    EXPECT_EQ(model.tie_word_embeddings, expected.tied);
    EXPECT_EQ(model.attention_bias, expected.qkv_bias);
    EXPECT_FALSE(model.o_bias || model.mlp_bias);
    EXPECT_EQ(model.qk_norm, expected.qk_norm);
    EXPECT_EQ(model.fused_projections, expected.fused);
    ASSERT_EQ(model.blocks.size(), 4u);
    for (const auto& block : model.blocks) EXPECT_EQ(block.sliding_window, expected.window);
    for (size_t i = 0; i < 4; ++i) {
      EXPECT_EQ(model.blocks[i].rope, model.architecture != "SmolLM3ForCausalLM" || i != 3) << i;
    }
  }
  EXPECT_EQ(read(minimal("GraniteForCausalLM")).attention_multiplier, 1.0);
  EXPECT_EQ(read(minimal("LlamaForCausalLM")).attention_multiplier, std::nullopt);
}

TEST(ModelConfig, NullIsNotSilence) {
  json config = minimal("MistralForCausalLM");
  config["num_key_value_heads"] = nullptr;
  config["sliding_window"] = nullptr;
  const ModelConfig model = read(config);
  EXPECT_EQ(model.num_key_value_heads, 32);
  EXPECT_EQ(model.blocks[0].sliding_window, 0);
}

TEST(ModelConfig, HeadsNeedNotFillTheHiddenSize) {
  json config = minimal("Qwen3ForCausalLM");
  config["hidden_size"] = 100;
  EXPECT_EQ(read(config).head_dim, 128);
}

TEST(ModelConfig, EachBlockHasItsWindow) {
  const auto windows = [](const json& config) {
    std::vector<int64_t> result;
    for (const auto& block : read(config).blocks) result.push_back(block.sliding_window);
    return result;
  };
  using Windows = std::vector<int64_t>;
  json config = minimal("Qwen2ForCausalLM");
  config["sliding_window"] = 7;
  config["max_window_layers"] = 3;
  EXPECT_EQ(windows(config), Windows({0, 0, 0, 0}));
  config["use_sliding_window"] = true;
  EXPECT_EQ(windows(config), Windows({0, 0, 0, 7}));
  config["layer_types"] = {"sliding_attention", "full_attention", "full_attention", "sliding_attention"};
  EXPECT_EQ(windows(config), Windows({7, 0, 0, 7}));
  config["use_sliding_window"] = false;
  expect_refused(config, {"layer_types", "sliding_attention", "use_sliding_window"});
  config["layer_types"] = {"full_attention"};
  expect_refused(config, {"layer_types", "4 names", "1"});
  config["layer_types"] = {"full_attention", "full_attention", "full_attention", "linear_attention"};
  expect_refused(config, {"layer_types", "linear_attention"});

  config = minimal("SmolLM3ForCausalLM");
  config["use_sliding_window"] = true;
  config["sliding_window"] = 7;
  config["no_rope_layer_interval"] = 2;
  EXPECT_EQ(windows(config), Windows({0, 7, 0, 7}));
  config["no_rope_layers"] = {0, 1, 1, 1};
  EXPECT_EQ(windows(config), Windows({7, 0, 0, 0}));
  config["no_rope_layers"] = {0, 1};
  expect_refused(config, {"no_rope_layers", "4 numbers", "2"});
}

TEST(ModelConfig, WhatIsNotSupportedIsNamed) {
  expect_refused(with("architectures", {"MixtralForCausalLM"}),
                 {"architectures", "MixtralForCausalLM", "LlamaForCausalLM, MistralForCausalLM", "computes the same"});
  expect_refused(with("hidden_act", "gelu"), {"hidden_act", "gelu"});
  expect_refused(with("rope_scaling", {{"rope_type", "longrope"}, {"factor", 8.0}}), {"rope_scaling", "longrope"});
  expect_refused(with("rope_scaling", {{"type", "mrope"}}), {"rope_scaling", "mrope", "llama3"});
  expect_refused(with("rope_parameters", {{"full_attention", {{"rope_type", "yarn"}}}}),
                 {"rope_parameters", "full_attention", "object"});
  expect_refused(with("partial_rotary_factor", 0.5), {"partial_rotary_factor 0.5", "LlamaForCausalLM"});
}

TEST(ModelConfig, RopeScalingThatIsIncompleteOrContradictoryIsNamed) {
  const auto scaling = [](const json& value) { return with("rope_scaling", value); };
  expect_refused(scaling({{"rope_type", "linear"}}), {"rope_scaling: factor", "missing"});
  expect_refused(scaling({{"rope_type", "linear"}, {"factor", 0.5}}), {"factor", "0.5"});
  expect_refused(scaling({{"rope_type", "linear"}, {"type", "yarn"}, {"factor", 2.0}}), {"yarn", "linear"});
  expect_refused(scaling({{"rope_type", "llama3"}, {"factor", 8.0}}), {"original_max_position_embeddings", "missing"});
  expect_refused(scaling({{"rope_type", "llama3"},
                          {"factor", 8.0},
                          {"original_max_position_embeddings", 64},
                          {"low_freq_factor", 4.0},
                          {"high_freq_factor", 1.0}}),
                 {"high_freq_factor 1", "low_freq_factor 4"});
  expect_refused(scaling({{"rope_type", "linear"}, {"factor", 2.0}, {"rope_theta", 5e5}}),
                 {"rope_scaling", "rope_theta 500000", "10000"});
  json both = scaling({{"rope_type", "linear"}, {"factor", 2.0}});
  both["rope_parameters"] = {{"rope_type", "linear"}, {"factor", 3.0}};
  expect_refused(both, {"rope_scaling", "rope_parameters", "differ"});
  json phi3 = minimal("Phi3ForCausalLM");
  phi3["rope_scaling"] = {{"type", "longrope"}, {"short_factor", {1.0, 2.0}}, {"long_factor", {1.0, 2.0}}};
  expect_refused(phi3, {"short_factor", "64 numbers", "2"});
  phi3["rope_scaling"] = {{"type", "linear"}, {"factor", 2.0}};
  expect_refused(phi3, {"linear", "Phi3ForCausalLM", "longrope"});
}

TEST(ModelConfig, ImpossibleValuesAreNamed) {
  expect_refused(with("hidden_size", 0), {"hidden_size"});
  expect_refused(with("hidden_size", -4), {"hidden_size", "-4"});
  expect_refused(with("hidden_size", "32"), {"hidden_size", "\"32\""});
  expect_refused(with("vocab_size", 1.5), {"vocab_size"});
  expect_refused(with("num_hidden_layers", 1 << 20), {"num_hidden_layers", "4096"});
  expect_refused(with("hidden_size", (1 << 20) + 1), {"hidden_size", "from 1 to 1048576", "1048577"});
  expect_refused(with("intermediate_size", 1 << 30), {"intermediate_size", "from 1 to 1048576"});
  json heads = with("num_attention_heads", 1 << 11);
  heads["num_key_value_heads"] = 1 << 11;
  heads["head_dim"] = 1 << 10;
  expect_refused(heads, {"num_attention_heads 2048 times head_dim 1024", "2097152 features, expected at most 1048576"});
  expect_refused(with("num_key_value_heads", 3), {"num_key_value_heads 3"});
  expect_refused(with("head_dim", 7), {"head_dim 7"});
  expect_refused(with("rms_norm_eps", -1.0), {"rms_norm_eps"});
  expect_refused(with("tie_word_embeddings", 1), {"tie_word_embeddings"});
  expect_refused(json::array(), {"dir/config.json", "object"});
}

TEST(ModelConfig, ThetaMayStandInRopeParameters) {
  json config = with("rope_parameters", {{"rope_type", "default"}, {"rope_theta", 500000.0}});
  config.erase("rope_theta");
  EXPECT_DOUBLE_EQ(ModelConfig::from_json(config, "config.json").rope.theta, 500000.0);
}

TEST(QuantizationConfig, ComesBackFromItsJson) {
  QuantizationConfig config;
  EXPECT_EQ(quantization_config_from_json(to_json(config), "q"), config);
  config.weights = QuantSpec{
      .num_bits = 3, .symmetric = false, .strategy = Strategy::kGroup, .group_size = 64, .scale_dtype = at::kBFloat16};
  config.input_activations = QuantSpec{.num_bits = 8, .strategy = Strategy::kToken, .dynamic = true};
  EXPECT_EQ(quantization_config_from_json(to_json(config), "q"), config);
  // The newer version is for what older ones have no place for.
  EXPECT_EQ(to_json(config).at("format_version"), 5);
  config.head = QuantSpec{.num_bits = 8};
  config.format_version = 6;
  EXPECT_EQ(to_json(config).at("format_version"), 6);
  EXPECT_EQ(quantization_config_from_json(to_json(config), "q"), config);
  for (const auto& head : {config.head, std::optional<QuantSpec>{}}) {
    config.head = head;
    config.overrides = {{"model.layers.0.mlp.up_proj", std::nullopt},
                        {"model.layers.1.mlp.up_proj", QuantSpec{.num_bits = 8}}};
    config.format_version = 7;
    config.uniform = false;
    EXPECT_EQ(to_json(config).at("format_version"), 7);
    EXPECT_EQ(quantization_config_from_json(to_json(config), "q"), config);
  }
  config.overrides.clear();
  config.uniform = true;
  config.runtime = {{Site::kO, {.group = 32}}, {Site::kDown, {.span = RuntimeSmooth::Span::kWindow}}};
  config.format_version = 7;
  EXPECT_EQ(to_json(config).at("format_version"), 7);
  EXPECT_EQ(quantization_config_from_json(to_json(config), "q"), config);
  json wrong = to_json(config);
  wrong["runtime_smooth"]["self_attn.v_cache_quant"] = json::object();
  expect_error([&] { quantization_config_from_json(wrong, "q"); }, {"runtime_smooth", "v_cache_quant"});
  wrong = to_json(config);
  wrong["input_activations"] = nullptr;
  expect_error([&] { quantization_config_from_json(wrong, "q"); }, {"runtime_smooth", "input_activations"});
}

TEST(QuantizationConfig, OverridesAreGridsByName) {
  const json plain = to_json(QuantizationConfig{.weights = QuantSpec{.num_bits = 4},
                                                .overrides = {{"model.layers.0.mlp.up_proj", QuantSpec{}}}});
  const auto expect_refused = [&](const json& overrides, const std::vector<std::string>& parts) {
    json config = plain;
    config["overrides"] = overrides;
    expect_error([&] { quantization_config_from_json(config, "q"); }, parts);
  };
  expect_refused({1, 2}, {"q: overrides", "object"});
  expect_refused("model.layers.0.mlp.up_proj", {"q: overrides", "object"});
  expect_refused({{"a", "b"}}, {"q: overrides.a", "object"});
  expect_refused({{"a", {{"num_bits", 1}}}}, {"q: overrides.a", "num_bits"});
  expect_refused({{"a", {{"levels", {1}}}}}, {"q: overrides.a", "levels", "reserved"});
  json nothing = plain;
  nothing["weights"] = nullptr;
  expect_error([&] { quantization_config_from_json(nothing, "q"); }, {"q: overrides", "full precision"});
  json none = plain;
  none["overrides"] = nullptr;
  EXPECT_TRUE(quantization_config_from_json(none, "q").uniform);
}

TEST(QuantizationConfig, FlagsOfOlderVersionsNameSites) {
  json config = to_json(QuantizationConfig{});
  EXPECT_EQ(config.at("format_version"), 5);
  for (const int64_t version : {3, 4}) {
    config["format_version"] = version;
    config["online_hadamard"] = {{"input", true}, {"query_key", false}, {"o", true}, {"down", false}};
    const QuantizationConfig read = quantization_config_from_json(config, "q");
    EXPECT_EQ(read.format_version, version);
    EXPECT_EQ(read.hadamards, (std::vector<Site>{Site::kQkv, Site::kGateUp, Site::kO}));
    json wrong = config;
    wrong["online_hadamard"]["value"] = true;
    expect_error([&] { quantization_config_from_json(wrong, "q"); }, {"online_hadamard", "value"});
    wrong.erase("online_hadamard");
    expect_error([&] { quantization_config_from_json(wrong, "q"); }, {"online_hadamard"});
  }
  config["format_version"] = 5;
  expect_error([&] { quantization_config_from_json(config, "q"); }, {"online_hadamard"});
}

TEST(QuantizationConfig, WhatIsReservedIsRefusedByName) {
  const json plain = to_json(QuantizationConfig{.weights = QuantSpec{.num_bits = 4}});
  const json grid = plain.at("weights");
  const std::pair<const char*, json> reserved[] = {
      {"head", grid}, {"embedding", grid}, {"overrides", {{"mlp.down_proj", grid}}}};
  json newer = to_json(QuantizationConfig{.head = QuantSpec{}});
  newer["overrides"] = {{"mlp.down_proj", grid}};
  expect_error([&] { quantization_config_from_json(newer, "q"); }, {"q: overrides", "reserved"});
  for (const auto& [key, value] : reserved) {
    json config = plain;
    config[key] = value;
    expect_error([&] { quantization_config_from_json(config, "q"); }, {std::string("q: ") + key, "reserved"});
    config[key] = nullptr;
    EXPECT_NO_THROW(quantization_config_from_json(config, "q")) << key;
  }
  for (const char* key : {"levels", "block_scale"}) {
    json config = plain;
    config["weights"][key] = {1.0, 2.0};
    expect_error([&] { quantization_config_from_json(config, "q"); }, {std::string("q: weights: ") + key, "reserved"});
  }
}

TEST(QuantizationConfig, AnotherMethodOrVersionIsRefused) {
  json config = to_json(QuantizationConfig{});
  config["quant_method"] = "gptq";
  expect_error([&] { quantization_config_from_json(config, "q"); }, {"quant_method", "gptq", "already quantized"});
  config = to_json(QuantizationConfig{});
  config["format_version"] = 99;
  expect_error([&] { quantization_config_from_json(config, "q"); }, {"format_version", "99"});
  config = to_json(QuantizationConfig{});
  config["surprise"] = 1;
  expect_error([&] { quantization_config_from_json(config, "q"); }, {"surprise"});
}

}  // namespace
}  // namespace baseq
