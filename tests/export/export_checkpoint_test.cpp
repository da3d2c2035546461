#include "baseq/export/export_checkpoint.h"

#include <gtest/gtest.h>

#include "../tiny_model.h"
#include "baseq/pipeline/quantize_checkpoint.h"

namespace baseq {
namespace {

using nlohmann::json;
using test::expect_error;
using test::TempDirectory;
using test::TinyShape;

constexpr const char* kRotated = R"({
  "weights": {"num_bits": 5, "strategy": "group", "group_size": 4}, "dtype": "float32",
  "transforms": {"residual": "hadamard", "value": "hadamard", "query_key": "hadamard", "o": "hadamard",
                 "down": "hadamard"}})";
constexpr const char* kPlain = R"({"weights": {"num_bits": 4, "symmetric": false, "scale_dtype": "bfloat16"}})";

class Export : public testing::Test {
 protected:
  explicit Export(const TinyShape& tiny = {}) : shape(tiny) { test::write_checkpoint(directory / "in", shape); }
  Checkpoint quantized(const char* recipe) {
    quantize_checkpoint(Checkpoint(directory / "in"), Recipe::from_json(json::parse(recipe), "recipe"), {},
                        directory / "native", {.output = {.force = true}});
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

TEST_P(ExportVariant, EveryWrongTensorIsFoundBeforeTheDirectoryAppears) {
  for (const auto format : {ExportFormat::kHuggingFace, ExportFormat::kCompressedTensors}) {
    const Checkpoint native = quantized(kPlain);
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

/// Shapes whose names export knows; FusedProjectionsAreRefused has the others.
std::vector<TinyShape> exportable_shapes() {
  std::vector<TinyShape> shapes = test::tiny_shapes();
  std::erase_if(shapes, [](const TinyShape& shape) { return shape.name == "phi3"; });
  return shapes;
}

INSTANTIATE_TEST_SUITE_P(Shapes, ExportVariant, testing::ValuesIn(exportable_shapes()),
                         [](const auto& shape) { return shape.param.name; });

TEST(ExportOfPhi3, FusedProjectionsAreRefused) {
  const TempDirectory directory;
  for (const TinyShape& shape : test::tiny_shapes()) {
    if (shape.name == "phi3") test::write_checkpoint(directory / "in", shape);
  }
  expect_error([&] { plan_export(Checkpoint(directory / "in"), {}); }, {"fused projections"});
}

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
                   {"o_proj's input", "down_proj's input", "w4a16-vllm"});
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

TEST_F(Export, FormatsAreKnownByName) {
  EXPECT_EQ(export_format("hf"), ExportFormat::kHuggingFace);
  EXPECT_EQ(export_format("compressed-tensors"), ExportFormat::kCompressedTensors);
  expect_error([] { export_format("onnx"); }, {"\"onnx\"", "hf, compressed-tensors, gguf"});
}

}  // namespace
}  // namespace baseq
