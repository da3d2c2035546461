#include "baseq/pipeline/recipe.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "../io/temp_directory.h"
#include "baseq/pipeline/activations.h"

namespace baseq {
namespace {

using nlohmann::json;
using test::expect_error;

void expect_refused(const char* text, const std::vector<std::string>& parts) {
  expect_error([&] { Recipe::from_json(json::parse(text), "recipe.json"); }, parts);
}

TEST(Recipe, EveryConfigParsesAndIsAFixedPoint) {
  size_t count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(std::filesystem::path(BASEQ_SOURCE_DIR) / "configs")) {
    if (entry.path().extension() != ".json") continue;
    SCOPED_TRACE(entry.path().filename().string());
    const json file = read_json_file(entry.path().string());
    const Recipe recipe = Recipe::from_json(file, entry.path().string());
    EXPECT_EQ(recipe.name, entry.path().stem().string());
    const json written = recipe.to_json();
    EXPECT_EQ(Recipe::from_json(written, "written").to_json(), written);
    // Nothing that the file says is lost.
    const json merged = [&] {
      json result = written;
      result.merge_patch(file);
      return result;
    }();
    EXPECT_EQ(merged, written);
    ++count;
  }
  EXPECT_GE(count, 5u);
}

TEST(Recipe, EveryFieldSurvivesTheRoundTrip) {
  const json original = json::parse(R"({
    "name": "everything",
    "weights": {"num_bits": 3, "symmetric": false, "strategy": "group", "group_size": 16, "dynamic": false,
                "scale_dtype": "bfloat16"},
    "rounding": {"method": "gptq", "mse_clip": false, "mse_norm": 2.0, "block_size": 32, "damping": 0.05,
                 "activation_order": false, "static_groups": false, "compensate_streams": true, "cross_strength": 0.75,
                 "quantized_inputs": true},
    "low_rank": {"method": "l2qer", "rank": 7, "dtype": "float32", "start": "svd", "steps": 9, "learning_rate": 0.7,
                 "block_epochs": 0, "block_learning_rate": 0.6},
    "input_activations": {"num_bits": 6, "symmetric": true, "clip": 0.8, "shift": "mean", "norm_shift": "zero"},
    "kv_cache": {"num_bits": 3, "symmetric": true, "clip": 0.7, "shift": "zero"},
    "transforms": {"residual": "hadamard", "value": "hadamard", "query_key": "hadamard", "o": "hadamard",
                   "down": "hadamard", "scale_norm": true, "scale_value": true, "scale_query_key": true,
                   "scale_down": true},
    "learn_transforms": {"epochs": 2, "value_rotation": false, "value_scale": false, "o_scale": false,
                         "down_scale": false, "lr_rotation": 0.1, "lr_scale": 0.2, "lr_clip": 0.3, "lr_shift": 0.4,
                         "final_lr": 0.5},
    "learn_activations": {"epochs": 3, "clip": false, "shift": false, "gain": false,
                          "lr_clip": 0.6, "lr_shift": 0.7, "lr_gain": 0.8, "final_lr": 0.9},
    "objective": {"loss": "relative", "stream": "quantized", "products": "float32", "batch_size": 2, "num_monitored": 3},
    "calibration": {"num_samples": 5, "seq_len": 6, "activations_dtype": "bfloat16"},
    "dtype": "bfloat16"
  })");
  json expected = original;
  const json written = Recipe::from_json(original, "recipe.json").to_json();
  expected["transforms"]["input"] = "none";
  EXPECT_EQ(written, expected);
}

TEST(Recipe, TheEmptyRecipeLeavesTheModelAsItIs) {
  const Recipe recipe = Recipe::from_json(json::object(), "recipe.json");
  EXPECT_FALSE(recipe.needs_calibration());
  EXPECT_EQ(recipe.quantization_config(), QuantizationConfig{});
}

TEST(Recipe, UnknownKeysAreNamedWithTheirPath) {
  expect_refused(R"({"wieghts": {}})", {"recipe.json", "wieghts"});
  expect_refused(R"({"weights": {"bits": 4}})", {"recipe.json", "weights", "bits"});
  expect_refused(R"({"rounding": {"methd": "rtn"}})", {"rounding", "methd"});
  expect_refused(R"({"weights": {}, "low_rank": {"r": 1}})", {"low_rank", "r"});
  expect_refused(R"({"input_activations": {"norm": 1}})", {"input_activations", "norm"});
  expect_refused(R"({"kv_cache": {"norm_shift": "mean"}})", {"kv_cache", "norm_shift"});
  expect_refused(R"({"transforms": {"qk": "hadamard"}})", {"transforms", "qk"});
  expect_refused(R"({"learn_transforms": {"epoch": 1}})", {"learn_transforms", "epoch"});
  expect_refused(R"({"learn_activations": {"lr": 1}})", {"learn_activations", "lr"});
  expect_refused(R"({"objective": {"losss": "mse"}})", {"objective", "losss"});
  expect_refused(R"({"calibration": {"samples": 1}})", {"calibration", "samples"});
}

TEST(Recipe, ImpossibleValuesAreNamedWithTheirPath) {
  expect_refused(R"({"weights": {"num_bits": 1}})", {"recipe.json", "weights", "num_bits", "1"});
  expect_refused(R"({"weights": {"num_bits": "four"}})", {"weights", "num_bits", "\"four\""});
  expect_refused(R"({"weights": {"strategy": "group"}})", {"weights", "group_size"});
  expect_refused(R"({"weights": {"group_size": 64}})", {"weights", "group_size"});
  expect_refused(R"({"weights": {"strategy": "token"}})", {"weights", "strategy"});
  expect_refused(R"({"weights": {"dynamic": true}})", {"weights", "static"});
  expect_refused(R"({"weights": {"scale_dtype": "int8"}})", {"weights", "scale_dtype", "int8"});
  expect_refused(R"({"weights": 4})", {"weights", "object"});
  expect_refused(R"({"rounding": {"method": "awq"}})", {"rounding", "method", "awq"});
  expect_refused(R"({"rounding": {"damping": -1}})", {"rounding", "damping", "-1"});
  expect_refused(R"({"weights": {}, "low_rank": {"rank": 0}})", {"low_rank", "rank", "0"});
  expect_refused(R"({"weights": {}, "low_rank": {"method": "lora"}})", {"low_rank", "method", "lora"});
  expect_refused(R"({"weights": {}, "low_rank": {"dtype": "int4"}})", {"low_rank", "dtype", "int4"});
  expect_refused(R"({"weights": {}, "low_rank": {"block_epochs": 1}})", {"low_rank", "block_epochs", "fbquant"});
  expect_refused(R"({"low_rank": {}})", {"low_rank", "weights"});
  expect_refused(
      R"({"weights": {}, "rounding": {"method": "gptq", "mse_clip": false}, "low_rank": {"method": "fbquant"}})",
      {"fbquant", "rounding.method"});
  expect_refused(R"({"weights": {}, "rounding": {"method": "gptq"}, "low_rank": {"method": "fbquant"}})",
                 {"fbquant", "rtn"});
  expect_refused(R"({"input_activations": {"num_bits": 9}})", {"input_activations", "num_bits"});
  expect_refused(R"({"kv_cache": {"clip": 1.5}})", {"kv_cache", "clip", "1.5"});
  expect_refused(R"({"kv_cache": {"shift": "median"}})", {"kv_cache", "shift", "median"});
  expect_refused(R"({"transforms": {"down": true}})", {"transforms", "down", "true"});
  expect_refused(R"({"transforms": {"residual": "hadamard", "input": "hadamard"}})", {"transforms", "residual"});
  expect_refused(R"({"learn_activations": {"epochs": -1}})", {"learn_activations", "epochs", "-1"});
  expect_refused(R"({"calibration": {"seq_len": 1}})", {"calibration", "seq_len", "1"});
  expect_refused(R"({"calibration": {"activations_dtype": "float16"}})",
                 {"calibration", "activations_dtype", "float16"});
  expect_refused(R"({"objective": {"products": "int8"}})", {"objective", "products", "int8"});
  expect_refused(R"({"learn_transforms": {"epochs": 1}})", {"learn_transforms", "weights"});
  expect_refused(R"({"weights": {}, "learn_transforms": {"epochs": 1, "value_rotation": false, "value_scale": false,
                     "down_scale": false}})",
                 {"learn_transforms", "nothing to learn"});
  expect_refused(R"({"dtype": "int4"})", {"dtype", "int4"});
  expect_refused(R"([])", {"recipe.json", "object"});
}

TEST(Recipe, ActivationStreamsAreOfTheTypesThatTheirStorageHas) {
  for (const at::ScalarType dtype : ActivationStorage::kDtypes) {
    const std::string name = dtype == at::kFloat ? "float32" : "bfloat16";
    const Recipe recipe = Recipe::from_json({{"calibration", {{"activations_dtype", name}}}}, "r");
    EXPECT_EQ(recipe.activations_dtype, dtype);
    EXPECT_EQ(ActivationStorage{.dtype = recipe.activations_dtype}.allocate({4}).scalar_type(), dtype);
  }
}

TEST(Recipe, SwitchesThatAreOffMatterOnlyToWhatIsLearned) {
  // Without epochs, or with points whose clips are learned, there is nothing wrong with them.
  for (const char* text :
       {R"({"learn_transforms": {"value_rotation": false, "value_scale": false, "down_scale": false}})",
        R"({"weights": {}, "input_activations": {}, "learn_transforms": {"epochs": 1, "value_rotation": false,
            "value_scale": false, "o_scale": false, "down_scale": false}})"}) {
    EXPECT_NO_THROW(Recipe::from_json(json::parse(text), "r")) << text;
  }
}

TEST(Recipe, KnowsWhetherItNeedsCalibration) {
  const auto needs = [](const char* text) { return Recipe::from_json(json::parse(text), "r").needs_calibration(); };
  EXPECT_FALSE(needs(R"({"weights": {}, "rounding": {"method": "rtn"}})"));
  EXPECT_TRUE(needs(R"({"weights": {}, "rounding": {"method": "gptq"}})"));
  EXPECT_FALSE(needs(R"({"weights": {}, "low_rank": {"method": "svd"}})"));
  for (const char* method : {"l2qer", "qera-approx", "qera-exact"}) {
    EXPECT_TRUE(needs((std::string(R"({"weights": {}, "low_rank": {"method": ")") + method + "\"}}").c_str()))
        << method;
  }
  EXPECT_FALSE(needs(R"({"transforms": {"residual": "hadamard", "down": "hadamard"}})"));
  EXPECT_TRUE(needs(R"({"transforms": {"scale_down": true}})"));
  EXPECT_FALSE(needs(R"({"kv_cache": {"shift": "zero"}})"));
  EXPECT_TRUE(needs(R"({"kv_cache": {"shift": "mean"}})"));
  EXPECT_TRUE(needs(R"({"input_activations": {"norm_shift": "mean"}})"));
  EXPECT_TRUE(needs(R"({"weights": {}, "learn_transforms": {"epochs": 1}})"));
  EXPECT_TRUE(needs(R"({"learn_activations": {"epochs": 1}})"));
}

TEST(OverrideRecipe, SetsNestedValues) {
  json recipe = json::parse(R"({"weights": {"num_bits": 4}})");
  override_recipe(recipe, "weights.num_bits", "3");
  override_recipe(recipe, "rounding.method", "gptq");
  override_recipe(recipe, "rounding.damping", "0.5");
  override_recipe(recipe, "transforms.scale_down", "true");
  override_recipe(recipe, "kv_cache", "null");
  override_recipe(recipe, "name", "mine");
  EXPECT_EQ(recipe, json::parse(R"({"weights": {"num_bits": 3}, "rounding": {"method": "gptq", "damping": 0.5},
                                    "transforms": {"scale_down": true}, "kv_cache": null, "name": "mine"})"));
}

TEST(OverrideRecipe, FillsInAnObjectThatIsNull) {
  json recipe = json::parse(R"({"kv_cache": null})");
  override_recipe(recipe, "kv_cache.num_bits", "4");
  EXPECT_EQ(recipe, json::parse(R"({"kv_cache": {"num_bits": 4}})"));
}

TEST(OverrideRecipe, RefusesToPassThroughAValue) {
  json recipe = json::parse(R"({"name": "x", "weights": {"num_bits": 4}})");
  const json before = recipe;
  expect_error([&] { override_recipe(recipe, "weights.num_bits.x", "3"); }, {"weights.num_bits.x"});
  expect_error([&] { override_recipe(recipe, "name.x", "3"); }, {"name.x"});
  EXPECT_EQ(recipe, before);
  expect_error([&] { override_recipe(recipe, "", "3"); }, {"dotted path"});
  expect_error([&] { override_recipe(recipe, "weights.", "3"); }, {"weights."});
  expect_error([&] { override_recipe(recipe, "weights..x", "3"); }, {"weights..x"});
}

}  // namespace
}  // namespace baseq
