#include "model/unused_tensors.h"

#include <gtest/gtest.h>

#include "../tiny_model.h"
#include "baseq/formats/open_model.h"

namespace baseq {
namespace {

using test::TempDirectory;
using test::TinyShape;
using Names = std::vector<std::string>;
using Tensors = std::map<std::string, Tensor>;

struct Case {
  std::string name;
  Tensor tensor;
  bool harmless;
  const char* reason;
};

std::vector<Unused> unused_of(const TempDirectory& directory, const nlohmann::json& config, const Tensors& tensors) {
  test::write_checkpoint(directory / "model", config, tensors);
  const Checkpoint checkpoint(directory / "model");
  return find_unused(Model(checkpoint));
}

TEST(UnusedTensors, WhatEveryModelHasIsUsed) {
  for (const TinyShape& shape : test::tiny_shapes()) {
    SCOPED_TRACE(shape.name);
    const TempDirectory directory;
    Tensors tensors = test::tiny_tensors(shape, 1);
    EXPECT_TRUE(unused_of(directory, test::tiny_config(shape), tensors).empty());
    // As a model without a head spells the names.
    Tensors bare;
    for (const auto& [name, tensor] : tensors) bare[name.starts_with("model.") ? name.substr(6) : name] = tensor;
    EXPECT_TRUE(unused_of(directory, test::tiny_config(shape), bare).empty());
  }
  for (const std::string& variant : test::golden_variants()) {
    const Checkpoint checkpoint(test::golden_directory(variant));
    EXPECT_TRUE(find_unused(Model(checkpoint)).empty()) << variant;
  }
}

TEST(UnusedTensors, EachIsJudgedByNameAndContent) {
  const TinyShape shape;  // tied, without biases
  const Tensors tensors = test::tiny_tensors(shape, 1);
  const Tensor embedding = tensors.at("model.embed_tokens.weight");
  const Case cases[] = {
      {"model.layers.1.self_attn.rotary_emb.inv_freq", at::ones({4}), true, "buffers of other programs"},
      {"model.layers.0.attention.masked_bias", at::ones({1}), true, "buffers of other programs"},
      {"lm_head.weight", embedding.to(at::kDouble), true, "repeats the embedding"},
      {"lm_head.weight", embedding + 1, false, "the two differ"},
      {"lm_head.weight", at::ones({3, 2}), false, "the two differ"},
      {"model.layers.0.self_attn.q_proj.bias", at::zeros({32}), true, "biases of zero"},
      {"model.layers.0.self_attn.q_proj.bias", at::ones({32}), false, "no such biases (attention_bias, mlp_bias)"},
      {"model.layers.2.mlp.up_proj.weight", at::ones({2, 2}), false, "num_hidden_layers 2"},
      {"model.layers.0.self_attn.foo", at::ones({2}), false, "LlamaForCausalLM has no such tensors"},
      {"model.layers.0.self_attn.q_proj.weight_scale", at::ones({2}), false, "LlamaForCausalLM has no such tensors"},
      {"lm_head.bias", at::ones({40}), false, "LlamaForCausalLM has no such tensors"},
      {"model.layers.99999999999999999999.x", at::ones({2}), false, "LlamaForCausalLM has no such tensors"}};
  for (const Case& one : cases) {
    SCOPED_TRACE(one.name);
    const TempDirectory directory;
    Tensors more = tensors;
    more[one.name] = one.tensor;
    const std::vector<Unused> unused = unused_of(directory, test::tiny_config(shape), more);
    ASSERT_EQ(unused.size(), 1U);
    EXPECT_EQ(unused[0].names, Names{one.name});
    EXPECT_EQ(unused[0].harmless, one.harmless);
    EXPECT_EQ(unused[0].message().find("\"" + one.name + "\" is not used: "), 0U) << unused[0].message();
    EXPECT_NE(unused[0].message().find(one.reason), std::string::npos) << unused[0].message();
  }
}

TEST(UnusedTensors, OneSentenceForEachReason) {
  const TempDirectory directory;
  nlohmann::json config = test::tiny_config({.num_layers = 3});
  config["num_hidden_layers"] = 2;
  Tensors tensors = test::tiny_tensors({.num_layers = 3}, 1);
  tensors["model.layers.0.foo"] = tensors["model.layers.1.foo"] = at::ones({2});
  const std::vector<Unused> unused = unused_of(directory, config, tensors);
  ASSERT_EQ(unused.size(), 2U);
  EXPECT_EQ(unused[0].message().find("\"model.layers.0.foo\" and 1 more are not used: "), 0U);
  EXPECT_EQ(unused[1].message().find("\"model.layers.2.input_layernorm.weight\" and 8 more are not used: "), 0U);
}

TEST(UnusedTensors, AdaptersAreNotApplied) {
  const TempDirectory directory;
  test::write_checkpoint(directory / "model", TinyShape{});
  std::filesystem::create_directory(directory / "model/adapter");
  test::write_bytes(directory / "model/adapter/adapter_config.json", "{}");
  test::write_bytes(directory / "model/adapter_config.json", "{}");
  const Checkpoint checkpoint(directory / "model");
  const std::vector<Unused> unused = find_unused(Model(checkpoint));
  ASSERT_EQ(unused.size(), 1U);
  EXPECT_FALSE(unused[0].harmless);
  EXPECT_EQ(unused[0].names, (Names{"adapter_config.json", "adapter/adapter_config.json"}));
}

}  // namespace
}  // namespace baseq
