#include "baseq/model/model.h"

#include <gtest/gtest.h>

#include "../counted_checkpoint.h"
#include "baseq/formats/open_model.h"
#include "formats/native/config.h"
#include "model/named_tensors.h"
#include "quantized_block.h"

namespace baseq {
namespace {

using test::expect_error;
using test::TempDirectory;
using test::TinyShape;

using Variants = std::vector<std::string>;

const Variants kWithBlocks = {"llama_base", "llama_untied_bias", "llama_mha_headdim", "llama_sharded"};
const Variants kScaled = {"llama_linear",       "llama_dynamic", "llama_llama3", "llama_yarn",
                          "llama_yarn_options", "qwen3_options", "phi3_longrope"};

Variants all_variants() {
  Variants variants = kWithBlocks;
  for (std::string& variant : test::golden_variants()) variants.push_back(std::move(variant));
  return variants;
}

double largest_difference(const Tensor& a, const Tensor& b) { return (a - b).abs().max().item<double>(); }

class ModelGolden : public testing::TestWithParam<std::string> {
 protected:
  const std::filesystem::path directory = test::golden_directory(GetParam());
  const Checkpoint checkpoint{directory};
  const SafetensorsFile golden{directory / "golden.safetensors"};
};
class ModelGoldenShort : public ModelGolden {};
class ModelGoldenBlocks : public ModelGolden {};
class ModelGoldenScaled : public ModelGolden {};

TEST_P(ModelGolden, LogitsAreThoseOfTransformers) {
  const Tensor logits = Model(checkpoint).logits(golden.tensor("input_ids"));
  const Tensor expected = golden.tensor("logits");
  ASSERT_EQ(logits.sizes(), expected.sizes());
  EXPECT_LT(largest_difference(logits, expected), 1e-4) << "re-run scripts/make_goldens.py";
}

TEST_P(ModelGoldenShort, LogitsAreThoseOfTransformers) {
  const Tensor expected = golden.tensor("short_logits");
  const Tensor ids = golden.tensor("input_ids").narrow(1, 0, expected.size(1));
  EXPECT_LT(largest_difference(Model(checkpoint).logits(ids), expected), 1e-4);
}

TEST_P(ModelGoldenBlocks, AModelAndItsCopiesOwnWhatTheyRead) {
  std::vector<Model> models;
  models.push_back(Model(open_model(directory)));
  models.push_back(models.front());
  models.front() = Model(Checkpoint(directory));
  for (const Model& model : models) {
    EXPECT_LT(largest_difference(model.logits(golden.tensor("input_ids")), golden.tensor("logits")), 1e-4);
  }
}

TEST_P(ModelGoldenBlocks, EveryBlockIsThatOfTransformers) {
  const Model model(checkpoint);
  Tensor hidden = model.embed(golden.tensor("input_ids"));
  const RotaryEmbedding rope = model.rotary(hidden.size(1));
  for (int64_t i = 0; i < model.config().num_hidden_layers; ++i) {
    hidden = model.layer(i).forward(hidden, rope);
    EXPECT_LT(largest_difference(hidden, golden.tensor("layers." + std::to_string(i))), 1e-4) << "block " << i;
  }
}

TEST_P(ModelGoldenScaled, RopeParametersOfTransformers5ChangeNothing) {
  nlohmann::json config = checkpoint.config();
  nlohmann::json rope = config["rope_scaling"];
  rope["rope_theta"] = config["rope_theta"];
  if (config.contains("partial_rotary_factor")) rope["partial_rotary_factor"] = config["partial_rotary_factor"];
  for (const char* key : {"rope_scaling", "rope_theta", "partial_rotary_factor"}) config.erase(key);
  config["rope_parameters"] = rope;
  const TempDirectory copy;
  std::filesystem::copy(directory / "model.safetensors", copy / "model.safetensors");
  test::write_bytes(copy / "config.json", config.dump());
  const Tensor ids = golden.tensor("input_ids");
  EXPECT_TRUE(at::equal(Model(Checkpoint(copy.path())).logits(ids), Model(checkpoint).logits(ids)));
}

TEST_P(ModelGolden, SpellingAndDtypesAndBuffersOfTheCheckpointChangeNothing) {
  std::map<std::string, Tensor> tensors;
  // Each is widened or kept, so that no bit is lost.
  const at::ScalarType types[] = {at::kDouble, at::kFloat, at::kBFloat16};
  size_t next = 0;
  for (const std::string& name : checkpoint.names()) {
    const Tensor tensor = checkpoint.tensor(name);
    const at::ScalarType type = types[next++ % 3];
    tensors[name.starts_with("model.") ? name.substr(6) : name] =
        tensor.to(type).to(at::kFloat).equal(tensor.to(at::kFloat)) ? tensor.to(type) : tensor;
  }
  tensors["layers.0.self_attn.rotary_emb.inv_freq"] = at::full({4}, 7.0);
  tensors["layers.0.self_attn.o_proj.bias_of_something"] = at::full({4}, 7, at::kLong);
  const TempDirectory copy;
  test::write_checkpoint(copy.path(), checkpoint.config(), tensors);
  const Tensor ids = golden.tensor("input_ids");
  EXPECT_TRUE(at::equal(Model(Checkpoint(copy.path())).logits(ids), Model(checkpoint).logits(ids)));
}

TEST_P(ModelGoldenScaled, ScalingChangesTheLogits) {
  nlohmann::json config = checkpoint.config();
  config["rope_scaling"] = nullptr;
  const TempDirectory copy;
  std::filesystem::copy(directory / "model.safetensors", copy / "model.safetensors");
  test::write_bytes(copy / "config.json", config.dump());
  const Tensor logits = Model(Checkpoint(copy.path())).logits(golden.tensor("input_ids"));
  EXPECT_GT(largest_difference(logits, golden.tensor("logits")), 0.05);
}

constexpr auto kVariantName = [](const auto& variant) { return variant.param; };
INSTANTIATE_TEST_SUITE_P(Variants, ModelGolden, testing::ValuesIn(all_variants()), kVariantName);
INSTANTIATE_TEST_SUITE_P(Variants, ModelGoldenShort, testing::ValuesIn(test::golden_variants()), kVariantName);
INSTANTIATE_TEST_SUITE_P(Variants, ModelGoldenBlocks, testing::ValuesIn(kWithBlocks), kVariantName);
INSTANTIATE_TEST_SUITE_P(Variants, ModelGoldenScaled, testing::ValuesIn(kScaled), kVariantName);

TEST(Model, MissingTensorsAreAllListed) {
  const TempDirectory directory;
  const TinyShape shape{.tied = false};
  auto tensors = test::tiny_tensors(shape, 1);
  const std::vector<std::string> missing = {"lm_head.weight", "model.norm.weight",
                                            "model.layers.0.self_attn.k_proj.weight",
                                            "model.layers.1.mlp.down_proj.weight"};
  for (const auto& name : missing) ASSERT_EQ(tensors.erase(name), 1u);
  test::write_checkpoint(directory.path(), test::tiny_config(shape), tensors);
  const Checkpoint checkpoint(directory.path());
  std::vector<std::string> parts = missing;
  parts.push_back("4 tensors are missing");
  expect_error([&] { Model model(checkpoint); }, parts);
}

TEST(Model, BiasesThatTheConfigPromisesAreRequired) {
  const TempDirectory directory;
  nlohmann::json config = test::tiny_config({});
  config["mlp_bias"] = true;
  test::write_checkpoint(directory.path(), config, test::tiny_tensors({}, 1));
  const Checkpoint checkpoint(directory.path());
  expect_error([&] { Model model(checkpoint); }, {"mlp.up_proj.bias"});
}

TEST(Model, BiasesThatTheConfigDoesNotPromiseAreNotTheModels) {
  const TempDirectory directory;
  auto tensors = test::tiny_tensors({}, 1);
  test::write_checkpoint(directory / "without", test::tiny_config({}), tensors);
  tensors["model.layers.0.self_attn.o_proj.bias"] = at::ones({32});
  test::write_checkpoint(directory / "with", test::tiny_config({}), tensors);
  const Tensor ids = test::random_ids({1, 5}, 40, 2);
  EXPECT_TRUE(at::equal(Model(Checkpoint(directory / "with")).logits(ids),
                        Model(Checkpoint(directory / "without")).logits(ids)));
}

TEST(Model, FusedProjectionsAreMissedAndMeasuredUnderTheirOwnNames) {
  const TempDirectory directory;
  TinyShape shape;
  for (const TinyShape& candidate : test::family_shapes()) {
    if (candidate.name == "phi3") shape = candidate;
  }
  auto tensors = test::tiny_tensors(shape, 1);
  ASSERT_TRUE(tensors.contains("model.layers.1.mlp.gate_up_proj.weight"));
  tensors["model.layers.1.mlp.gate_up_proj.weight"] = at::zeros({3, 32});
  test::write_checkpoint(directory / "rows", test::tiny_config(shape), tensors);
  const Checkpoint rows(directory / "rows");
  const Model model(rows);
  expect_error([&] { model.layer(1); }, {"model.layers.1.mlp.gate_up_proj.weight", "[3, 32]", "80 rows"});
  tensors.erase("model.layers.1.mlp.gate_up_proj.weight");
  tensors.erase("model.layers.0.self_attn.qkv_proj.weight");
  test::write_checkpoint(directory / "missing", test::tiny_config(shape), tensors);
  const Checkpoint missing(directory / "missing");
  expect_error([&] { Model unread(missing); },
               {"2 tensors are missing", "model.layers.0.self_attn.qkv_proj.weight, model.layers.1.mlp.gate_up_proj"});
}

TEST(Model, CheckpointOfAnotherQuantizerIsRefused) {
  const TempDirectory directory;
  nlohmann::json config = test::tiny_config({});
  config["quantization_config"] = {{"quant_method", "gptq"}, {"bits", 4}};
  auto tensors = test::tiny_tensors({}, 1);
  test::write_checkpoint(directory / "named", config, tensors);
  const Checkpoint named(directory / "named");
  expect_error([&] { Model model(named); }, {"config.json", "gptq", "already quantized", "original"});
  const Tensor codes = at::zeros({4, 32}, at::kInt);
  tensors["model.layers.0.mlp.up_proj.weight"] = codes;
  test::write_checkpoint(directory / "integers", test::tiny_config({}), tensors);
  const Checkpoint integers(directory / "integers");
  expect_error([&] { Model(integers).layer(0); }, {"model.layers.0.mlp.up_proj.weight", "I32", "already quantized"});
  tensors.erase("model.layers.0.mlp.up_proj.weight");
  tensors["model.layers.0.mlp.up_proj.qweight"] = codes;
  test::write_checkpoint(directory / "packed", test::tiny_config({}), tensors);
  const Checkpoint packed(directory / "packed");
  expect_error([&] { Model model(packed); }, {"model.layers.0.mlp.up_proj.weight", "up_proj.qweight", "original"});
}

TEST(Model, TensorOfAnotherShapeIsRefusedByName) {
  const TempDirectory directory;
  auto tensors = test::tiny_tensors({}, 1);
  tensors["model.layers.1.mlp.up_proj.weight"] = at::zeros({3, 5});
  tensors["model.norm.weight"] = at::ones({7});
  test::write_checkpoint(directory.path(), test::tiny_config({}), tensors);
  const Checkpoint checkpoint(directory.path());
  const Model model(checkpoint);
  expect_error([&] { model.layer(1); }, {"model.layers.1.mlp.up_proj.weight", "[3, 5]"});
  expect_error([&] { model.final_norm(); }, {"model.norm.weight", "[7]"});
  expect_error([&] { model.layer(2); }, {"index 2", "2 layers"});
}

TEST(Model, ALinearWithoutCodesHasNothingToDequantize) {
  expect_error([] { Linear().dequantized(); }, {"Linear::dequantized", "no codes"});
}

TEST(Model, EmbedRefusesIdsOutsideTheVocabulary) {
  const TempDirectory directory;
  const TinyShape shape;
  test::write_checkpoint(directory.path(), shape);
  const Checkpoint checkpoint(directory.path());
  const Model model(checkpoint);
  EXPECT_EQ(model.embed(at::tensor({0, 39}, at::kLong).view({1, 2})).sizes(), at::IntArrayRef({1, 2, 32}));
  expect_error([&] { model.logits(at::zeros({1, 2})); }, {"embed: token ids are", "Float", "expected integers"});
  expect_error([&] { model.logits(at::zeros({2}, at::kLong)); }, {"logits: token ids are of size [2]"});
  expect_error([&] { model.embed(at::tensor({0, 40}, at::kLong).view({1, 2})); }, {"40", "39"});
  expect_error([&] { model.embed(at::tensor({-1, 3}, at::kLong).view({1, 2})); }, {"-1"});
}

TEST(Model, ATensorIsReadOnceAndItsShapeNever) {
  const TempDirectory directory;
  test::write_checkpoint(directory / "model", TinyShape{});
  const test::CountedCheckpoint counted{Checkpoint(directory / "model")};
  const Model model(counted.checkpoint());
  const std::string name = "model.layers.0.mlp.up_proj.weight";
  EXPECT_EQ(model.tensors().info(name).shape, (std::vector<int64_t>{48, 32}));
  EXPECT_EQ(counted.reads(name), 0);
  EXPECT_EQ(model.layer(0).mlp.up_proj.weight.sizes(), at::IntArrayRef({48, 32}));
  EXPECT_EQ(counted.reads(name), 1);
}

TEST(Model, AStoredLayerIsReadWithoutLossInAtLeastFloat32) {
  const TempDirectory directory;
  auto tensors = test::tiny_tensors({}, 1);
  for (auto& [name, tensor] : tensors) {
    if (tensor.dim() == 2) tensor = tensor.to(name.starts_with("model.layers.0.") ? at::kBFloat16 : at::kDouble);
  }
  test::write_checkpoint(directory / "model", test::tiny_config({}), tensors);
  const Checkpoint checkpoint(directory / "model");
  const Model model(checkpoint);
  for (const int64_t block : {0, 1}) {
    const DecoderLayer layer = model.stored_layer(block);
    EXPECT_EQ(layer.input_layernorm.weight.scalar_type(), at::kFloat);
    EXPECT_EQ(layer.mlp.up_proj.weight.scalar_type(), block == 0 ? at::kFloat : at::kDouble);
    const Tensor stored = tensors.at(layer_prefix(block) + "mlp.up_proj.weight");
    EXPECT_TRUE(at::equal(layer.mlp.up_proj.weight.to(at::kDouble), stored.to(at::kDouble)));
  }
}

TEST(Model, DoublePrecisionAgreesWithFloat) {
  const TempDirectory directory;
  for (const TinyShape& shape : test::tiny_shapes()) {
    SCOPED_TRACE(shape.name);
    test::write_checkpoint(directory / shape.name, shape);
    const Checkpoint checkpoint(directory / shape.name);
    const Tensor ids = test::random_ids({2, 9}, shape.vocab_size, 3);
    const Tensor exact = Model(checkpoint, {.dtype = at::kDouble}).logits(ids);
    EXPECT_EQ(exact.scalar_type(), at::kDouble);
    EXPECT_LT(test::relative_error(Model(checkpoint).logits(ids), exact), 1e-5);
  }
}

struct Grid {
  const char* name;
  QuantSpec spec;
  int64_t lora_rank = 0;
  at::ScalarType lora_dtype = at::kBFloat16;
};

class SavedLayer : public testing::TestWithParam<Grid> {};

TEST_P(SavedLayer, ComesBackExactly) {
  const QuantSpec spec = GetParam().spec;
  for (const TinyShape& shape : test::tiny_shapes()) {
    SCOPED_TRACE(shape.name);
    if (spec.strategy == Strategy::kGroup &&
        (shape.hidden_size % spec.group_size != 0 || shape.intermediate_size % spec.group_size != 0)) {
      continue;
    }
    QuantizationConfig quantization{.weights = spec, .lora_rank = GetParam().lora_rank};
    quantization.input_activations = test::token_grid(4);
    quantization.kv_cache = test::cache_grid(shape, 4);
    const DecoderLayer layer = test::quantized_block(shape, quantization, GetParam().lora_dtype);
    const TempDirectory directory;
    test::write_quantized(directory.path(), shape, quantization, layer);
    const Checkpoint checkpoint(directory.path());
    const Model model(checkpoint);
    EXPECT_EQ(model.quantization(), quantization);
    const DecoderLayer loaded = model.layer(0);

    std::map<std::string, const Linear*> originals;
    layer.for_each_linear([&](const std::string& name, const Linear& linear) { originals[name] = &linear; });
    loaded.for_each_linear([&](const std::string& name, const Linear& linear) {
      const Linear& original = *originals.at(name);
      EXPECT_TRUE(at::equal(linear.weight, original.weight)) << name;
      ASSERT_TRUE(linear.quantized.has_value()) << name;
      EXPECT_TRUE(at::equal(linear.quantized->codes, original.quantized->codes)) << name;
      EXPECT_TRUE(at::equal(linear.quantized->qparams.scale, original.quantized->qparams.scale)) << name;
      EXPECT_EQ(linear.lora.defined(), quantization.lora_rank > 0) << name;
      EXPECT_EQ(linear.bias.defined(), original.bias.defined()) << name;
      EXPECT_TRUE(!linear.bias.defined() || at::equal(linear.bias, original.bias)) << name;
    });
    const Tensor x = test::random_normal({2, 7, shape.hidden_size}, 8, at::kFloat);
    const RotaryEmbedding rope = test::tiny_rope(shape, 7, at::kFloat);
    EXPECT_TRUE(at::equal(loaded.forward(x, rope), layer.forward(x, rope)));
    // Saved again it is the same: nothing was rounded on the way.
    const auto again = layer_tensors(loaded, layer_prefix(0), at::kFloat);
    for (const auto& [name, tensor] : again) EXPECT_TRUE(at::equal(tensor, checkpoint.tensor(name))) << name;
    EXPECT_EQ(again.size(), layer_tensors(layer, "", at::kFloat).size());
  }
}

INSTANTIATE_TEST_SUITE_P(
    Grids, SavedLayer,
    testing::Values(
        Grid{"Symmetric4Channel", {.num_bits = 4}}, Grid{"Asymmetric4Channel", {.num_bits = 4, .symmetric = false}},
        Grid{"Symmetric3Group", {.num_bits = 3, .strategy = Strategy::kGroup, .group_size = 8}},
        Grid{"Asymmetric4Group", {.num_bits = 4, .symmetric = false, .strategy = Strategy::kGroup, .group_size = 8}},
        Grid{"Symmetric4ChannelLowRank", {.num_bits = 4}, /*lora_rank=*/3},
        Grid{"Symmetric4ChannelLowRank8Bits", {.num_bits = 4}, /*lora_rank=*/3, at::kChar},
        Grid{"Symmetric2GroupRankOfASide", {.num_bits = 2, .strategy = Strategy::kGroup, .group_size = 8}, 64},
        Grid{"Symmetric8Tensor", {.num_bits = 8, .strategy = Strategy::kTensor}},
        Grid{"Asymmetric5ChannelBfloat16", {.num_bits = 5, .symmetric = false, .scale_dtype = at::kBFloat16}}),
    [](const auto& grid) { return std::string(grid.param.name); });

}  // namespace
}  // namespace baseq
