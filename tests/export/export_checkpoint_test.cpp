#include "baseq/export/export_checkpoint.h"

#include <gtest/gtest.h>

#include "../counted_checkpoint.h"
#include "../job_of.h"
#include "../tiny_model.h"
#include "baseq/pipeline/job.h"
#include "baseq/transform/hadamard.h"

namespace baseq {
namespace {

using nlohmann::json;
using test::expect_error;
using test::TempDirectory;
using test::TinyShape;

/// A recipe that rounds weights to nearest.
std::string rounded(const std::string& grid) {
  return R"({"grids": {"weights": )" + grid + R"(}, "steps": [{"step": "round"}]})";
}

constexpr const char* kRotated = R"({
  "dtype": "float32",
  "grids": {"weights": {"num_bits": 5, "strategy": "group", "group_size": 4}},
  "steps": [{"step": "transform", "at": ["residual", "value", "query_key", "o", "down"]}, {"step": "round"}]})";
const std::string kHalf = rounded(R"({"num_bits": 4, "symmetric": false, "scale_dtype": "float16"})"),
                  kPlain = rounded(R"({"num_bits": 4, "symmetric": false, "scale_dtype": "bfloat16"})");

class Export : public testing::Test {
 protected:
  explicit Export(const TinyShape& tiny = {}) : shape(tiny) { test::write_checkpoint(directory / "in", shape); }
  Checkpoint quantized(const std::string& recipe) {
    quantize(test::job_of(directory / "in", Recipe::from_json(json::parse(recipe), "recipe"), {}, directory / "native",
                          {.output = {.force = true}}));
    return Checkpoint(directory / "native");
  }
  void run(const Checkpoint& native, const ExportOptions& options, const CheckpointWriter::Options& output = {}) {
    write_export(native, plan_export(native, options), directory / "out", output);
  }

  TinyShape shape;
  TempDirectory directory;
};

class ExportVariant : public Export, public testing::WithParamInterface<TinyShape> {
 protected:
  ExportVariant() : Export(GetParam()) {}
};

TEST_P(ExportVariant, HuggingFaceComputesWhatTheNativeCheckpointComputes) {
  const Checkpoint native = quantized(kRotated);
  run(native, {.dtype = at::kFloat});
  const Checkpoint out(directory / "out");
  EXPECT_FALSE(out.config().contains("quantization_config"));
  EXPECT_FALSE(out.config().at("tie_word_embeddings").get<bool>());
  const Tensor ids = test::random_ids({2, 11}, shape.vocab_size, 4);
  EXPECT_LT(test::relative_error(Model(out).logits(ids), Model(native).logits(ids)), 1e-5);
}

TEST_P(ExportVariant, APlanReadsNoWeights) {
  const test::CountedCheckpoint counted{Checkpoint(directory / "in")};
  EXPECT_GT(plan_export(counted.checkpoint(), {}).num_bytes(), 0);
  for (const std::string& name : counted.checkpoint().names()) EXPECT_EQ(counted.reads(name), 0) << name;
}

TEST_P(ExportVariant, EveryWrongTensorIsFoundBeforeTheDirectoryAppears) {
  for (const auto format :
       {ExportFormat::kHuggingFace, ExportFormat::kCompressedTensors, ExportFormat::kGptq, ExportFormat::kAwq}) {
    const bool half = format == ExportFormat::kGptq || format == ExportFormat::kAwq;
    if (half && shape.name != "gqa" && shape.name != "phi3") continue;  // sizes that fill words
    const Checkpoint native = quantized(half ? kHalf : kPlain);
    const ExportPlan plan = plan_export(native, {.format = format});
    for (size_t i = 0; i < plan.tensors.size(); ++i) {
      const std::string& name = plan.tensors[i].name;
      if (name.ends_with("weight_shape")) continue;  // what a wrong one breaks is not the value
      ExportPlan wrong = plan;
      wrong.tensors[i].make = [make = plan.tensors[i].make] {
        Tensor tensor = make().clone().contiguous();
        Tensor last = tensor.view({-1}).narrow(0, tensor.numel() - 1, 1);
        last.copy_(tensor.is_floating_point() ? last * 2 + 1 : at::bitwise_xor(last, 1));
        return tensor;
      };
      expect_error([&] { write_export(native, wrong, directory / "out"); }, {"differs from the source"});
      EXPECT_FALSE(std::filesystem::exists(directory / "out")) << name;
      EXPECT_FALSE(std::filesystem::exists(directory / "out.partial")) << name;
    }
    write_export(native, plan, directory / "out", {.force = true});
    std::filesystem::remove_all(directory / "out");
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, ExportVariant, testing::ValuesIn(test::tiny_shapes()),
                         [](const auto& shape) { return shape.param.name; });

TEST_F(Export, OneBiasMakesBiasesOfItsWholeGroup) {
  const Checkpoint native = quantized(kRotated);
  std::map<std::string, Tensor> tensors;
  for (const std::string& name : native.names()) tensors[name] = native.tensor(name);
  tensors["model.layers.1.self_attn.k_proj.bias"] = test::random_normal({16}, 9, at::kFloat);
  test::write_checkpoint(directory / "biased", native.config(), tensors);
  const Checkpoint biased(directory / "biased");
  for (const auto format : {ExportFormat::kHuggingFace, ExportFormat::kCompressedTensors}) {
    if (format == ExportFormat::kCompressedTensors) {
      expect_error([&] { plan_export(biased, {.format = format, .dtype = at::kFloat}); },
                   {"bias of self_attn.o_proj", "online", "w4a16-vllm"});
      continue;
    }
    run(biased, {.format = format, .dtype = at::kFloat}, {.force = true});
    const Checkpoint out(directory / "out");
    EXPECT_TRUE(out.config().at("attention_bias").get<bool>());
    EXPECT_FALSE(out.config().at("mlp_bias").get<bool>());
    EXPECT_TRUE(at::equal(out.tensor("model.layers.0.self_attn.o_proj.bias"), at::zeros({32})));
    EXPECT_FALSE(out.contains("model.layers.0.mlp.up_proj.bias"));
    const Tensor ids = test::random_ids({1, 7}, shape.vocab_size, 4);
    EXPECT_LT(test::relative_error(Model(out).logits(ids), Model(biased).logits(ids)), 1e-5);
    EXPECT_GT(test::relative_error(Model(out).logits(ids), Model(native).logits(ids)), 1e-5);
  }
}

TEST_F(Export, PackedWordsAreThoseOfTheNativeCheckpoint) {
  const Checkpoint native = quantized(kPlain);
  run(native, {.format = ExportFormat::kCompressedTensors});
  const Checkpoint out(directory / "out");
  for (const char* part : {"weight_packed", "weight_scale", "weight_zero_point", "weight_shape"}) {
    const std::string name = std::string("model.layers.1.mlp.gate_proj.") + part;
    EXPECT_TRUE(at::equal(out.tensor(name), native.tensor(name))) << name;
  }
}

TEST_F(Export, ValuesThatTheDtypeCannotHoldAreRefused) {
  auto tensors = test::tiny_tensors(shape, 1);
  tensors["model.norm.weight"][3] = 1e6;
  test::write_checkpoint(directory / "large", test::tiny_config(shape), tensors);
  const Checkpoint large(directory / "large");
  expect_error([&] { run(large, {.dtype = at::kHalf}); }, {"model.norm.weight", "Half cannot hold"});
  EXPECT_FALSE(std::filesystem::exists(directory / "out"));
  run(large, {.dtype = at::kBFloat16});
}

TEST_F(Export, OnlineTransformsAreWrittenWithTheirMatrixAndTheirWarning) {
  const Checkpoint native = quantized(kRotated);
  test::write_bytes(directory / "native/README.md", "# A model\n");
  const ExportPlan plan = plan_export(native, {.format = ExportFormat::kCompressedTensors, .dtype = at::kFloat});
  EXPECT_NE(plan.notes.back().find("transformers ignores them"), std::string::npos);
  write_export(native, plan, directory / "out");
  const Checkpoint out(directory / "out");
  const json groups = out.config().at("quantization_config").at("transform_config").at("config_groups");
  // 32 inputs of o_proj are a power of two, which runtimes build themselves; 48 of down_proj are not.
  EXPECT_EQ(groups.at("o").at("type"), "hadamard");
  EXPECT_EQ(groups.at("down").at("type"), "random-hadamard");
  EXPECT_FALSE(out.contains("model.layers.0.self_attn.o_proj.o_input.weight"));
  const Tensor matrix = out.tensor("model.layers.0.mlp.down_proj.down_input.weight");
  EXPECT_TRUE(at::equal(matrix.abs(), at::ones({48, 48})));
  const Tensor x = test::random_normal({3, 48}, 5, at::kFloat);
  EXPECT_LT(test::relative_error(at::matmul(x, matrix) / std::sqrt(48.0), hadamard_transform(x)), 1e-6);
  const std::string readme = test::read_bytes(directory / "out/README.md");
  EXPECT_TRUE(readme.starts_with("---\n") && readme.ends_with("# A model\n")) << readme;
  EXPECT_NE(readme.find("garbage"), std::string::npos);
}

TEST_F(Export, EverythingThatAFormatCannotCarryIsNamedAtOnce) {
  const Checkpoint native = quantized(R"({
    "grids": {"weights": {"num_bits": 5, "symmetric": false}, "input_activations": {}, "kv_cache": {}},
    "steps": [{"step": "transform", "at": ["qkv", "gate_up", "down"]}, {"step": "points", "at": ["*"]},
              {"step": "round"}]})");
  expect_error([&] { plan_export(native, {.format = ExportFormat::kGptq}); },
               {"input_activations", "kv_cache", "site qkv", "site gate_up", "site down", "weights of 5 bits",
                "float32 scales", "the recipe w4-gptq"});
  expect_error([&] { plan_export(native, {.format = ExportFormat::kAwq}); },
               {"input_activations", "weights of 5 bits", "the recipe w4-awq"});
  expect_error([&] { plan_export(native, {.format = ExportFormat::kCompressedTensors}); },
               {"kv_cache", "asymmetric activations", "asymmetric weights of 5 bits", "float32 scales", "w4a4-vllm"});
  expect_error([&] { plan_export(native, {.format = ExportFormat::kGguf}); },
               {"input_activations", "kv_cache", "site qkv", "weights of 5 bits", "float32 scales"});
}

TEST_F(Export, SizesThatDoNotFillWordsAreRefused) {
  shape.intermediate_size = 42;
  test::write_checkpoint(directory / "in", shape);
  const Checkpoint native = quantized(kHalf);
  expect_error([&] { plan_export(native, {.format = ExportFormat::kGptq}); }, {"mlp.gate_proj's 42 outputs", "8"});
  expect_error([&] { plan_export(native, {.format = ExportFormat::kAwq}); }, {"mlp.up_proj's 42 outputs", "8"});
}

TEST_F(Export, TensorParallelismIsSaidForGroups) {
  const auto note = [&](const std::string& grid) {
    const Checkpoint native = quantized(rounded(grid));
    return plan_export(native, {.format = ExportFormat::kCompressedTensors, .dtype = at::kFloat}).notes.back();
  };
  // 4 heads, and 48 inputs of down_proj: in groups of 16 three, of 8 six.
  EXPECT_NE(note(R"({"strategy": "group", "group_size": 16})").find("mlp.down_proj's 48 inputs"), std::string::npos);
  EXPECT_NE(note(R"({"strategy": "group", "group_size": 8})").find("over 2 devices"), std::string::npos);
  EXPECT_NE(note(R"({"num_bits": 8})").find("4 heads"), std::string::npos);
}

TEST_F(Export, FormatsAreKnownByName) {
  EXPECT_EQ(export_format("hf"), ExportFormat::kHuggingFace);
  EXPECT_EQ(export_format("compressed-tensors"), ExportFormat::kCompressedTensors);
  expect_error([] { export_format("onnx"); }, {"\"onnx\"", "hf, compressed-tensors, gptq, awq, peft, gguf"});
}

}  // namespace
}  // namespace baseq
