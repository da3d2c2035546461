#include <gtest/gtest.h>

#include "baseq/model/decoder.h"
#include "eval/checkpoint_summary.h"
#include "model/named_tensors.h"
#include "override_items.h"
#include "pipeline/footprint.h"
#include "pipeline/grid_overrides.h"
#include "tiny_run.h"

namespace baseq {
namespace {

using nlohmann::json;
using test::expect_error;
using test::expect_refused;
using test::item;
using test::list_of;
using test::recipe_of;
using test::TinyShape;

const json kRound = {{{"step", "round"}}};

/// A recipe of 4 bits per channel with these overrides.
json with_overrides(const json& overrides, const json& steps = kRound) {
  return {
      {"dtype", "float32"}, {"grids", {{"weights", {{"num_bits", 4}}}, {"overrides", overrides}}}, {"steps", steps}};
}

Recipe recipe_with(const json& overrides, const json& steps = kRound) {
  return Recipe::from_json(with_overrides(overrides, steps), "recipe.json");
}

/// 8 bits in down_proj, 3 asymmetric ones in groups in o_proj of block 1; the first block keeps q_proj and all of its
/// MLP but down_proj.
const json kMixed =
    list_of(item({"*.down_proj"}, {{"num_bits", 8}}),
            item({"model.layers.0.mlp.*", "re:.*layers\\.0\\.self_attn\\.q_proj$"}, nullptr),
            item({"model.layers.0.mlp.down_proj"}, {{"num_bits", 8}, {"scale_dtype", "bfloat16"}}),
            item({"*.1.*.o_proj"}, {{"num_bits", 3}, {"symmetric", false}, {"strategy", "group"}, {"group_size", 4}}));

/// The uniform recipes whose linears kMixed takes, by name within the model; absent: in full precision.
std::optional<json> grid_in_mixed(const std::string& name) {
  if (name == "model.layers.0.mlp.down_proj") return json{{"num_bits", 8}, {"scale_dtype", "bfloat16"}};
  if (name == "model.layers.1.mlp.down_proj") return json{{"num_bits", 8}};
  if (name.starts_with("model.layers.0.mlp.") || name == "model.layers.0.self_attn.q_proj") return std::nullopt;
  if (name == "model.layers.1.self_attn.o_proj") {
    return json{{"num_bits", 3}, {"symmetric", false}, {"strategy", "group"}, {"group_size", 4}};
  }
  return json{{"num_bits", 4}};
}

TEST(Overrides, AreReadAsWhatDiffersAndTheLastOneThatMatchesCounts) {
  const Recipe recipe = Recipe::from_json(
      {{"grids",
        {{"weights",
          {{"num_bits", 3},
           {"symmetric", false},
           {"strategy", "group"},
           {"group_size", 8},
           {"scale_dtype", "float16"}}},
         {"overrides", list_of(item({"*_proj"}, {{"num_bits", 5}}), item({"*.up_proj"}, {{"strategy", "channel"}}),
                               item({"*.gate_proj"}, nullptr), item({"*.0.mlp.gate_proj"}, json::object()))}}},
       {"steps", kRound}},
      "recipe.json");
  QuantSpec spec = *recipe.grids.weights;
  EXPECT_EQ(recipe.grids.weights_of("model.layers.0.mlp.gate_proj"), spec);
  EXPECT_EQ(recipe.grids.weights_of("model.layers.1.mlp.gate_proj"), std::nullopt);
  EXPECT_EQ(recipe.grids.override_of("lm_head"), nullptr);
  EXPECT_EQ(recipe.grids.weights_of("lm_head"), spec);
  spec.num_bits = 5;
  EXPECT_EQ(recipe.grids.weights_of("model.layers.7.self_attn.q_proj"), spec);
  spec = *recipe.grids.weights;
  spec.strategy = Strategy::kChannel;
  spec.group_size = 0;
  EXPECT_EQ(recipe.grids.weights_of("model.layers.1.mlp.up_proj"), spec);
  // A block's own grids are the same by shorter names.
  for (const int64_t block : {0, 1}) {
    const Grids grids = recipe.grids.in_block(block);
    DecoderLayer{}.for_each_linear([&](const std::string& name, const Linear&) {
      EXPECT_EQ(grids.weights_of(name), recipe.grids.weights_of(layer_prefix(block) + name)) << name;
    });
  }
  EXPECT_EQ(Recipe::from_json(recipe.to_json(), "again").to_json(), recipe.to_json());
  EXPECT_NO_THROW(recipe.validate());
  EXPECT_FALSE(recipe_of(test::kRoundToNearest).to_json()["grids"].contains("overrides"));
}

TEST(Overrides, PatternsAreNamesStarsOrExpressions) {
  const std::string name = "model.layers.10.mlp.down_proj";
  const auto matches = [&](const std::string& pattern) {
    const Grids grids{.weights = QuantSpec{}, .overrides = {{.linears = {pattern}}}};
    return grids.override_of(name) != nullptr;
  };
  for (const char* pattern :
       {"model.layers.10.mlp.down_proj", "*", "**", "*.down_proj", "model.*", "*mlp*", "model.layers.10.*",
        "*1*0*.*down*", "re:.*down_proj", "re:model", "re:model\\.layers\\.1[0-9]\\.mlp\\.(up|down)_proj$"}) {
    EXPECT_TRUE(matches(pattern)) << pattern;
  }
  for (const char* pattern : {"down_proj", "model", "model.layers.1.*", "*.up_proj", "*down", "*.mlp.*.mlp.*",
                              "model.layers.10.mlp.down_proj*x", "MODEL.*", "re:down_proj", "re:model\\.layers\\.1\\.",
                              "re:.*down_pro$", "*down_projdown_proj"}) {
    EXPECT_FALSE(matches(pattern)) << pattern;
  }
}

TEST(Overrides, ThatSayNothingUsefulAreRefused) {
  const auto refused = [](const json& overrides, const std::vector<std::string>& parts) {
    expect_refused(with_overrides(overrides).dump(), parts);
  };
  refused(list_of(item(json::array(), nullptr)), {"recipe.json: grids.overrides[0].linears: names no linear"});
  refused(list_of(item({"*"}, nullptr), item({""}, nullptr)), {"grids.overrides[1].linears", "empty"});
  refused(list_of(item({"re:("}, nullptr)), {"grids.overrides[0].linears", "re:(", "no", "regular expression"});
  refused(list_of(item({"*"}, {{"num_bits", 9}})), {"grids.overrides[0].weights.num_bits", "2 to 8"});
  refused(list_of(item({"*"}, {{"strategy", "token"}})), {"grids.overrides[0].weights", "static grid"});
  refused(list_of(item({"*"}, {{"dynamic", true}})), {"grids.overrides[0].weights", "static grid"});
  refused(list_of(item({"*"}, {{"group_size", 8}})), {"grids.overrides[0].weights", "group_size goes with"});
  refused(list_of(item({"*"}, {{"bits", 8}})), {"grids.overrides[0].weights", "bits"});
  refused(list_of(json::object({{"linears", {"*"}}, {"num_bits", 8}})), {"grids.overrides[0]", "num_bits"});
  refused(list_of(item("*", nullptr)), {"grids.overrides[0].linears", "array"});
  refused(json::object({{"*.down_proj", {{"num_bits", 8}}}}), {"grids.overrides", "object"});
  Recipe recipe;
  recipe.grids.overrides = {{.linears = {"*"}}};
  expect_error([&] { recipe.validate(); }, {"grids.overrides", "there are none"});
  // What a C++ caller can build is held to the same rules.
  recipe = recipe_with(list_of(item({"*"}, nullptr)));
  recipe.grids.overrides[0].weights = QuantSpec{.num_bits = 4, .strategy = Strategy::kToken};
  expect_error([&] { recipe.validate(); }, {"grids.overrides[0].weights"});
}

class OverriddenRun : public test::TinyRun, public testing::WithParamInterface<TinyShape> {
 protected:
  OverriddenRun() : TinyRun(GetParam()) {}

  /// Codes, scales and all else of one linear are those of a uniform run with its grid.
  void expect_as_in_uniform_run(const Checkpoint& mixed, const std::string& name) {
    const std::optional<json> grid = grid_in_mixed(name);
    if (!grid) {
      EXPECT_TRUE(at::equal(mixed.tensor(name + ".weight"), original_weight(name))) << name;
      EXPECT_FALSE(mixed.contains(name + ".weight_packed"));
      return;
    }
    Recipe uniform = recipe_of(test::kRoundToNearest);
    uniform.grids.weights = recipe_with(list_of(item({"*"}, *grid))).grids.overrides[0].weights;
    run(uniform, "uniform", {.output = {.force = true}});
    const Checkpoint expected(directory / "uniform");
    for (const char* part : {".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape"}) {
      ASSERT_EQ(mixed.contains(name + part), expected.contains(name + part)) << name << part;
      if (mixed.contains(name + part)) {
        EXPECT_TRUE(at::equal(mixed.tensor(name + part), expected.tensor(name + part))) << name << part;
      }
    }
  }
  Tensor original_weight(const std::string& name) { return Model(*original).tensors().tensor(name + ".weight"); }
};

INSTANTIATE_TEST_SUITE_P(Shapes, OverriddenRun,
                         testing::ValuesIn({TinyShape{}, test::llama_shapes()[1], test::family_shapes()[1]}),
                         test::shape_name);

TEST_P(OverriddenRun, EachLinearIsThatOfAUniformRunWithItsGrid) {
  run(recipe_with(kMixed), "mixed");
  const StoredModel mixed = open_model(directory / "mixed");
  for (const int64_t block : {0, 1}) {
    DecoderLayer{}.for_each_linear([&](const std::string& linear, const Linear&) {
      const std::string name = layer_prefix(block) + linear;
      expect_as_in_uniform_run(mixed.tensors, name);
      const bool quantized = grid_in_mixed(name).has_value();
      EXPECT_EQ(mixed.linears.at(name).weights.has_value(), quantized);
    });
  }
  const json config = mixed.tensors.config()["quantization_config"];
  EXPECT_EQ(config["format_version"], 7);
  EXPECT_EQ(config["overrides"].size(), 2U + 2 + 1 + 1);
  EXPECT_TRUE(config["overrides"]["model.layers.0.mlp.up_proj"].is_null());
  EXPECT_EQ(config["overrides"]["model.layers.1.mlp.down_proj"]["num_bits"], 8);
  EXPECT_FALSE(mixed.quantization->uniform);
  // In integers and in floats, and by one linear at a time.
  const Model model(mixed);
  const Tensor exact = model.logits(ids);
  EXPECT_LT(test::relative_error(model.load().logits(ids), exact), 0.02);
  EXPECT_LT(test::relative_error(exact, logits("in")), 1.0);
  EXPECT_TRUE(
      at::equal(model.linear(0, "mlp.up_proj").weight, original_weight("model.layers.0.mlp.up_proj").to(at::kFloat)));
}

TEST_P(OverriddenRun, GridsThatAreAllAlikeGiveTheBytesOfAUniformCheckpoint) {
  run(recipe_of(test::kRoundToNearest), "uniform");
  run(Recipe::from_json(
          {{"grids", {{"weights", {{"num_bits", 4}}}, {"overrides", list_of(item({"*"}, {{"num_bits", 4}}))}}},
           {"steps", kRound}},
          "recipe"),
      "same");
  EXPECT_EQ(test::read_bytes(directory / "same" / "model.safetensors"),
            test::read_bytes(directory / "uniform" / "model.safetensors"));
  const json config = Checkpoint(directory / "same").config()["quantization_config"];
  EXPECT_EQ(config["format_version"], 5);
  EXPECT_FALSE(config.contains("overrides"));
}

TEST_P(OverriddenRun, EverythingElseOfARecipeWorksWithThem) {
  for (const char* text : {test::kEverything, test::kOnline}) {
    json recipe = json::parse(text);
    SCOPED_TRACE(recipe["name"].get<std::string>());
    // A whole block, a site of one reader, and one of several readers.
    for (const json& overrides :
         {kMixed, list_of(item({"model.layers.0.*"}, nullptr)), list_of(item({"*.down_proj", "*.k_proj"}, nullptr))}) {
      recipe["grids"]["overrides"] = overrides;
      run(recipe_of(recipe.dump()), "out", {.output = {.force = true}});
      EXPECT_TRUE(at::isfinite(logits("out")).all().item<bool>());
      // In full precision means as exact as the steps before it are.
      const Model model(Checkpoint(directory / "out"));
      const bool left_out = !model.stored().linears.at("model.layers.0.self_attn.k_proj").weights;
      EXPECT_EQ(model.linear(0, "self_attn.k_proj").quantized.has_value(), !left_out);
      EXPECT_EQ(model.linear(0, "self_attn.k_proj").lora.defined(), !left_out && text == test::kEverything);
    }
  }
}

TEST_P(OverriddenRun, LearnedClipsAndCorrectionsPassOverWhatIsLeftOut) {
  const json clips = {
      {{"step", "learn"}, {"weights", "straight_through"}, {"epochs", 1}, {"rates", {{"*.weight_clip", 0.01}}}},
      {{"step", "round"}}};
  const json corrections = {
      {{"step", "round"}, {"low_rank", {{"method", "fbquant"}, {"rank", 2}, {"steps", 2}}}},
      {{"step", "learn"}, {"epochs", 1}, {"rates", {{"*.low_rank", 0.01}, {"mlp.up_proj.low_rank", 0.02}}}}};
  for (const json& steps : {clips, corrections}) {
    for (const json& overrides : {kMixed, list_of(item({"model.layers.0.*"}, nullptr))}) {
      run(recipe_with(overrides, steps), "out", {.output = {.force = true}});
      EXPECT_TRUE(at::isfinite(logits("out")).all().item<bool>());
    }
  }
}

TEST_P(OverriddenRun, AnInterruptedRunContinuesToTheSameBytes) {
  json text = json::parse(test::kEverything);
  text["grids"]["overrides"] = kMixed;
  // Two passes: the states of the first, with codes, are kept between them.
  const json second = {{{"step", "round"}, {"method", "gptq"}}};
  text["passes"] = {{{"steps", text["steps"]}}, {{"steps", second}}};
  text.erase("steps");
  const Recipe recipe = recipe_of(text.dump());
  run(recipe, "whole");
  const int64_t steps = run_until(recipe, "counted", -1);
  forget("counted");
  for (const int64_t first : {steps / 7, steps / 2, steps * 6 / 7}) {
    SCOPED_TRACE(first);
    run_until(recipe, "resumed", first);
    run_until(recipe, "resumed", -1);
    expect_same_run("whole", "resumed");
    forget("resumed");
  }
}

TEST_P(OverriddenRun, ThePlanKnowsTheirSizeAndNamesWhatMatchesNothing) {
  run(recipe_with(kMixed), "mixed");
  int64_t bytes = 0;
  const Checkpoint out(directory / "mixed");
  for (const std::string& name : out.names()) {
    const TensorInfo info = out.info(name);
    if (name.starts_with("model.layers.")) bytes += info.numel() * static_cast<int64_t>(c10::elementSize(info.dtype));
  }
  const ModelConfig config = Model(out).config();
  const int64_t estimate = output_bytes(config, recipe_with(kMixed), at::kFloat).blocks;
  const int64_t uniform = output_bytes(config, recipe_with(json::array()), at::kFloat).blocks;
  run(recipe_with(json::array()), "uniform");
  int64_t uniform_bytes = 0;
  const Checkpoint all(directory / "uniform");
  for (const std::string& name : all.names()) {
    const TensorInfo info = all.info(name);
    if (name.starts_with("model.layers."))
      uniform_bytes += info.numel() * static_cast<int64_t>(c10::elementSize(info.dtype));
  }
  EXPECT_NEAR(static_cast<double>(estimate - uniform), static_cast<double>(bytes - uniform_bytes), 16 * 128);

  const Job job = test::job_of(*original,
                               recipe_with(list_of(item({"*.down_proj", "*.experts.*", "lm_head"}, nullptr),
                                                   item({"model.layers.2.*"}, {{"num_bits", 8}}),
                                                   item({"*.o_proj"}, {{"strategy", "group"}, {"group_size", 7}}))),
                               {}, directory / "out");
  std::vector<std::string> problems;
  for (const std::string& problem : plan(job).problems) {
    if (problem.starts_with("grids.")) problems.push_back(problem);
  }
  ASSERT_EQ(problems.size(), 4U);
  EXPECT_NE(problems[0].find("grids.overrides[0].linears: \"*.experts.*\" matches no linear"), std::string::npos);
  EXPECT_NE(problems[1].find("\"lm_head\""), std::string::npos);
  EXPECT_NE(problems[2].find("grids.overrides[1].linears: \"model.layers.2.*\""), std::string::npos);
  EXPECT_NE(problems[3].find("grids.overrides[2].weights.group_size: 7 does not divide"), std::string::npos);
  expect_error([&] { quantize(job); }, {"grids.overrides[0].linears", "*.experts.*"});
}

TEST_P(OverriddenRun, ChangedOverridesInTheConfigAreRefused) {
  run(recipe_with(kMixed), "mixed");
  const auto edited = [&](const std::string& linear, const json& grid) {
    json config = Checkpoint(directory / "mixed").config();
    config["quantization_config"]["overrides"][linear] = grid;
    std::filesystem::remove_all(directory / "edited");
    std::filesystem::copy(directory / "mixed", directory / "edited");
    test::write_bytes(directory / "edited" / "config.json", config.dump());
    return Model(open_model(directory / "edited")).logits(ids);
  };
  const json four = {{"num_bits", 4}, {"symmetric", true}, {"strategy", "channel"}};
  expect_error([&] { edited("model.layers.2.mlp.up_proj", four); }, {"overrides", "model.layers.2.mlp.up_proj"});
  expect_error([&] { edited("lm_head", four); }, {"overrides", "no linear", "lm_head"});
  expect_error([&] { edited("model.layers.0.mlp.up_proj", 4); }, {"overrides", "model.layers.0.mlp.up_proj"});
  expect_error([&] { edited("model.layers.0.mlp.up_proj", four); }, {"missing", "up_proj.weight_packed"});
  expect_error([&] { edited("model.layers.1.mlp.up_proj", nullptr); }, {"missing", "up_proj.weight"});
  json wrong = four;
  wrong["num_bits"] = 7;
  expect_error([&] { edited("model.layers.1.mlp.down_proj", wrong); }, {"down_proj.weight_packed"});
  wrong = four;
  wrong["levels"] = {1, 2};
  expect_error([&] { edited("model.layers.1.mlp.down_proj", wrong); }, {"levels", "reserved"});
  wrong = {{"num_bits", 8}, {"strategy", "group"}, {"group_size", 5}};
  expect_error([&] { edited("model.layers.1.mlp.down_proj", wrong); }, {"down_proj"});
}

TEST(Overrides, ExpressionsThatTakeTooLongAreRefused) {
  const json hostile = list_of(item({"re:((((.+)+)+)+)+[!?]"}, nullptr));
  const Recipe recipe = recipe_with(hostile);
  expect_error([&] { (void)recipe.grids.weights_of("model.layers.0.self_attn.q_proj"); }, {"takes too long to match"});
  const test::TempDirectory directory;
  test::write_checkpoint(directory / "in", TinyShape{});
  const Job job = test::job_of(directory / "in", recipe, {}, directory / "out");
  ASSERT_FALSE(plan(job).problems.empty());
  EXPECT_NE(plan(job).problems.back().find("takes too long to match"), std::string::npos);
  expect_error([&] { quantize(job); }, {"takes too long to match"});
}

TEST(Overrides, InspectionSaysWhichLinearsHaveWhichGrid) {
  StoredModel model = [] {
    const test::TempDirectory directory;
    test::write_checkpoint(directory / "in", TinyShape{.num_layers = 5});
    return StoredModel(Checkpoint(directory / "in"));
  }();
  for (int64_t block = 0; block < 5; ++block) {
    DecoderLayer{}.for_each_linear([&](const std::string& name, const Linear&) {
      LinearFormat& format = model.linears[layer_prefix(block) + name];
      format.weights = QuantSpec{.num_bits = name == "mlp.down_proj" ? 8 : 4};
      if (block != 1 && block != 3 && name.starts_with("mlp.")) return;
      if (name != "self_attn.v_proj" && name != "mlp.up_proj") return;
      format.weights.reset();
    });
  }
  using Rows = std::vector<std::pair<std::string, std::string>>;
  EXPECT_EQ(describe_linears(model),
            (Rows{{"4 bits, symmetric, per channel", "23 linears"},
                  {"full precision", "self_attn.v_proj in blocks 0-4; mlp.up_proj in blocks 1, 3"},
                  {"8 bits, symmetric, per channel", "mlp.down_proj in blocks 0-4"}}));
}

}  // namespace
}  // namespace baseq
