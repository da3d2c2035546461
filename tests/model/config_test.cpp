#include "baseq/model/config.h"

#include <gtest/gtest.h>

#include "../tiny_model.h"
#include "baseq/model/quantization_config.h"

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
  EXPECT_DOUBLE_EQ(model.rope_theta, 10000.0);
  EXPECT_TRUE(model.attention_bias);
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

TEST(ModelConfig, WhatIsNotSupportedIsNamed) {
  expect_refused(with("architectures", {"MistralForCausalLM"}), {"MistralForCausalLM", "LlamaForCausalLM"});
  expect_refused(with("hidden_act", "gelu"), {"hidden_act", "gelu"});
  expect_refused(with("rope_scaling", {{"rope_type", "llama3"}, {"factor", 8.0}}), {"rope_scaling", "llama3"});
  expect_refused(with("rope_scaling", {{"type", "linear"}, {"factor", 2.0}}), {"rope_scaling", "linear"});
  expect_refused(with("rope_parameters", {{"rope_type", "yarn"}}), {"rope_parameters", "yarn"});
}

TEST(ModelConfig, ImpossibleValuesAreNamed) {
  expect_refused(with("hidden_size", 0), {"hidden_size"});
  expect_refused(with("hidden_size", -4), {"hidden_size", "-4"});
  expect_refused(with("hidden_size", "32"), {"hidden_size", "\"32\""});
  expect_refused(with("vocab_size", 1.5), {"vocab_size"});
  expect_refused(with("num_key_value_heads", 3), {"num_key_value_heads 3"});
  expect_refused(with("head_dim", 7), {"head_dim 7"});
  expect_refused(with("rms_norm_eps", -1.0), {"rms_norm_eps"});
  expect_refused(with("tie_word_embeddings", 1), {"tie_word_embeddings"});
  expect_refused(json::array(), {"dir/config.json", "object"});
}

TEST(ModelConfig, ThetaMayStandInRopeParameters) {
  json config = with("rope_parameters", {{"rope_type", "default"}, {"rope_theta", 500000.0}});
  config.erase("rope_theta");
  EXPECT_DOUBLE_EQ(ModelConfig::from_json(config, "config.json").rope_theta, 500000.0);
}

TEST(QuantizationConfig, ComesBackFromItsJson) {
  QuantizationConfig config;
  EXPECT_EQ(quantization_config_from_json(to_json(config), "q"), config);
  config.weights = QuantSpec{
      .num_bits = 3, .symmetric = false, .strategy = Strategy::kGroup, .group_size = 64, .scale_dtype = at::kBFloat16};
  config.input_activations = QuantSpec{.num_bits = 8, .strategy = Strategy::kToken, .dynamic = true};
  config.input_hadamard = config.o_hadamard = true;
  EXPECT_EQ(quantization_config_from_json(to_json(config), "q"), config);
}

TEST(QuantizationConfig, AnotherMethodOrVersionIsRefused) {
  json config = to_json(QuantizationConfig{});
  config["quant_method"] = "gptq";
  expect_error([&] { quantization_config_from_json(config, "q"); }, {"quant_method", "gptq"});
  config = to_json(QuantizationConfig{});
  config["format_version"] = 99;
  expect_error([&] { quantization_config_from_json(config, "q"); }, {"format_version", "99"});
  config = to_json(QuantizationConfig{});
  config["surprise"] = 1;
  expect_error([&] { quantization_config_from_json(config, "q"); }, {"surprise"});
}

}  // namespace
}  // namespace baseq
