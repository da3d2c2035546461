#include <gtest/gtest.h>

#include "../pipeline/override_items.h"
#include "../pipeline/tiny_run.h"
#include "baseq/export/export_checkpoint.h"

namespace baseq {
namespace {

using nlohmann::json;
using test::expect_error;
using test::item;
using test::list_of;
using test::recipe_of;

/// Scales and groups that every format has.
json exported(const json& overrides, const char* scales, const json& weights = {{"num_bits", 4}}) {
  json grid = weights;
  grid["scale_dtype"] = scales;
  return {
      {"dtype", "float32"}, {"grids", {{"weights", grid}, {"overrides", overrides}}}, {"steps", {{{"step", "round"}}}}};
}

class OverriddenExport : public test::TinyRun {
 protected:
  OverriddenExport() : TinyRun({.hidden_size = 64, .intermediate_size = 96, .head_dim = 16, .vocab_size = 640}) {}
  StoredModel quantized(const json& recipe) {
    run(recipe_of(recipe.dump()), "native", {.output = {.force = true}});
    return open_model(directory / "native");
  }
  /// Writes an export and gives its logits.
  Tensor logits_of(const StoredModel& native, const ExportOptions& options, const char* name) {
    write_export(native.tensors, plan_export(native, options), directory / name, {.force = true});
    return Model(open_model(directory / name)).logits(ids);
  }
};

const json kExported = list_of(item({"*.down_proj"}, {{"num_bits", 8}}), item({"model.layers.0.mlp.up_proj"}, nullptr));

TEST_F(OverriddenExport, CompressedTensorsHasAGroupForEachGridAndIgnoresTheRest) {
  const StoredModel native = quantized(exported(kExported, "bfloat16"));
  const ExportOptions options{.format = ExportFormat::kCompressedTensors, .dtype = at::kFloat};
  EXPECT_TRUE(at::equal(logits_of(native, options, "out"), logits("native")));
  const StoredModel out = open_model(directory / "out");
  const json config = out.tensors.config()["quantization_config"];
  EXPECT_EQ(config["config_groups"].size(), 2U);
  EXPECT_EQ(config["config_groups"]["group_0"]["targets"].size(), 2U * 7 - 3);
  EXPECT_EQ(config["config_groups"]["group_1"]["targets"],
            json({"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}));
  EXPECT_EQ(config["config_groups"]["group_1"]["weights"]["num_bits"], 8);
  EXPECT_EQ(config["ignore"], json({"lm_head", "model.layers.0.mlp.up_proj"}));
  EXPECT_EQ(config["format"], "pack-quantized");
  // And again from there.
  EXPECT_TRUE(at::equal(logits_of(out, options, "again"), logits("native")));
}

TEST_F(OverriddenExport, CompressedTensorsNamesAMixtureOfFormats) {
  json recipe = exported(list_of(item({"*.down_proj"}, {{"num_bits", 4}})), "bfloat16", {{"num_bits", 8}});
  recipe["grids"]["input_activations"] = {{"num_bits", 8}, {"symmetric", true}};
  recipe["steps"] = {{{"step", "points"}, {"at", {"*"}}}, {{"step", "round"}}};
  const ExportOptions options{.format = ExportFormat::kCompressedTensors, .dtype = at::kFloat};
  const Tensor exported_logits = logits_of(quantized(recipe), options, "out");
  EXPECT_LT(test::relative_error(exported_logits, logits("native")), 1e-6);
  const json config = Checkpoint(directory / "out").config()["quantization_config"];
  EXPECT_EQ(config["format"], "mixed-precision");
  EXPECT_EQ(config["config_groups"]["group_0"]["format"], "int-quantized");
  EXPECT_EQ(config["config_groups"]["group_1"]["format"], "pack-quantized");
  recipe["grids"]["overrides"] = list_of(item({"*.down_proj"}, nullptr));
  expect_error([&] { plan_export(quantized(recipe), options); }, {"quantized inputs of linears in full precision"});
}

TEST_F(OverriddenExport, GgufHasATypeForEachTensor) {
  std::filesystem::copy(std::filesystem::path(BASEQ_TEST_DATA) / "tokenizer" / "tokenizer.json",
                        directory / "in" / "tokenizer.json", std::filesystem::copy_options::overwrite_existing);
  const StoredModel native = quantized(exported(kExported, "float16"));
  const ExportOptions q4{.format = ExportFormat::kGguf, .gguf_type = "Q4_0", .gguf_head_type = "F16"};
  const ExportPlan plan = plan_export(native, q4);
  std::map<std::string, std::string> types;
  for (const ExportedTensor& tensor : plan.exported_tensors()) types[tensor.name] = tensor.type;
  EXPECT_EQ(types.at("blk.0.ffn_down.weight"), "Q8_0");
  EXPECT_EQ(types.at("blk.0.ffn_up.weight"), "F16");
  EXPECT_EQ(types.at("blk.1.ffn_up.weight"), "Q4_0");
  EXPECT_LT(test::relative_error(logits_of(native, q4, "out.gguf"), logits("native")), 1e-3);
  EXPECT_EQ(open_model(directory / "out.gguf").linears.at("model.layers.1.mlp.down_proj").weights->num_bits, 8);
  // No linear has a grid that the type holds; a grid that no type holds.
  expect_error(
      [&] {
        plan_export(quantized(exported(json::array(), "float16", {{"num_bits", 6}})), q4);
      },
      {"weights of 6 bits"});
  expect_error(
      [&] {
        plan_export(
            quantized(exported(list_of(item({"*.o_proj"}, {{"num_bits", 6}, {"symmetric", false}})), "float16")), q4);
      },
      {"asymmetric weights"});
}

TEST_F(OverriddenExport, OthersCarryThemDequantizedOrRefuseThem) {
  const StoredModel native = quantized(exported(kExported, "float16"));
  EXPECT_LT(test::relative_error(logits_of(native, {.dtype = at::kFloat}, "hf"), logits("native")), 1e-6);
  for (const auto format : {ExportFormat::kGptq, ExportFormat::kAwq}) {
    expect_error([&] { plan_export(native, {.format = format}); }, {"linears with other grids", "grids.overrides"});
  }
  json recipe = exported(list_of(item({"*.down_proj"}, {{"num_bits", 8}})), "float16");
  recipe["steps"] = {{{"step", "round"}, {"low_rank", {{"method", "svd"}, {"rank", 2}}}}};
  EXPECT_EQ(export_formats(recipe_of(recipe.dump())), (std::vector<std::string>{"hf", "peft"}));
  EXPECT_NO_THROW(plan_export(quantized(recipe), {.format = ExportFormat::kPeft}));
  recipe["grids"]["overrides"] = list_of(item({"*.down_proj"}, nullptr));
  EXPECT_EQ(export_formats(recipe_of(recipe.dump())), (std::vector<std::string>{"hf"}));
  expect_error([&] { plan_export(quantized(recipe), {.format = ExportFormat::kPeft}); },
               {"model.layers.0.mlp.down_proj is in full precision"});
  EXPECT_EQ(export_formats(recipe_of(exported(kExported, "float16").dump())), (std::vector<std::string>{"hf", "gguf"}));
  EXPECT_EQ(export_formats(recipe_of(exported(kExported, "bfloat16").dump())),
            (std::vector<std::string>{"hf", "compressed-tensors"}));
}

}  // namespace
}  // namespace baseq
