#include "baseq/pipeline/recipe.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <limits>

#include "io/json_object.h"
#include "pipeline/activations.h"
#include "recipe_texts.h"

namespace baseq {
namespace {

using nlohmann::json;
using test::expect_error;
using test::expect_refused;
using test::kPoints;
using test::kRound;
using test::learn;
using test::recipe_of;
using test::with_grids;
using test::with_weights;

/// Whether `written` has everything that `file` says; "*" stands for several points.
void expect_nothing_lost(const json& file, const json& written) {
  if (file.is_object()) {
    for (const auto& [key, value] : file.items()) expect_nothing_lost(value, written.at(key));
  } else if (file.is_array() && file != json::array({"*"})) {
    ASSERT_EQ(file.size(), written.size());
    for (size_t i = 0; i < file.size(); ++i) expect_nothing_lost(file[i], written[i]);
  } else if (!file.is_array()) {
    EXPECT_EQ(file, written);
  }
}

TEST(Recipe, EveryConfigIsBuiltInParsesAndIsAFixedPoint) {
  size_t count = 0;
  const std::filesystem::path configs = std::filesystem::path(BASEQ_SOURCE_DIR) / "configs";
  for (const auto& entry : std::filesystem::recursive_directory_iterator(configs)) {
    if (entry.path().extension() != ".json") continue;
    SCOPED_TRACE(entry.path().filename().string());
    const std::string name = entry.path().stem().string();
    const BuiltInRecipe* built_in = find_built_in_recipe(name);
    ASSERT_NE(built_in, nullptr);
    EXPECT_EQ(built_in->json, test::read_bytes(entry.path()));
    EXPECT_EQ(built_in->group, entry.path().parent_path().filename().string());
    const json file = read_json_file(entry.path().string());
    const Recipe recipe = Recipe::from_json(file, entry.path().string());
    EXPECT_EQ(recipe.name, name);
    EXPECT_EQ(Recipe::read(name).to_json(), recipe.to_json());
    EXPECT_EQ(Recipe::read(entry.path().string()).to_json(), recipe.to_json());
    const json written = recipe.to_json();
    EXPECT_EQ(Recipe::from_json(written, "written").to_json(), written);
    expect_nothing_lost(file, written);
    EXPECT_NO_THROW(recipe.validate());
    ++count;
  }
  EXPECT_EQ(count, built_in_recipes().size());
}

TEST(Recipe, ANameMeansTheBuiltInRecipeInEveryDirectory) {
  const test::TempDirectory directory;
  const auto before = std::filesystem::current_path();
  std::filesystem::current_path(directory.path());
  test::write_bytes(directory / "rtn-w4a16", R"({"name": "a file", "steps": []})");
  test::write_bytes(directory / "mine", R"({"name": "mine", "steps": []})");
  std::filesystem::create_directory(directory / "rotated");  // such as the output of that recipe
  const std::vector<std::string> names = {Recipe::read("rtn-w4a16").name, Recipe::read("./rtn-w4a16").name,
                                          Recipe::read("mine").name, Recipe::read("rotated").name};
  std::filesystem::current_path(before);
  EXPECT_EQ(names, (std::vector<std::string>{"rtn-w4a16", "a file", "mine", "rotated"}));
}

TEST(Recipe, AnUnknownNameSuggestsTheNearest) {
  for (const auto& [given, meant] :
       std::vector<std::pair<std::string, std::string>>{{"baseq-w4a4kv", "baseq-w4a4kv4?"},
                                                        {"gptq-w4a16-g128", "gptq-w4a16-g64?"},
                                                        {"smoothquant", "smoothquant-w4a4kv4?"},
                                                        {"baseq-w4a4kv4.json", "baseq-w4a4kv4?"},
                                                        {"configs/baseq-w4a4kv4.json", "baseq-w4a4kv4?"}}) {
    expect_error([&] { Recipe::read(given); }, {given + " is neither a built-in recipe nor a file", "mean " + meant});
  }
  try {
    Recipe::read("x");
    FAIL();
  } catch (const c10::Error& error) {
    EXPECT_STREQ(error.what_without_backtrace(), "x is neither a built-in recipe nor a file");
  }
}

TEST(Recipe, TheMethodIsSaidInTheOrderOfTheSteps) {
  for (const auto& [name, method] : std::vector<std::pair<std::string, std::string>>{
           {"rtn-w8a8", "rtn"},
           {"baseq-w4a4kv4", "hadamard, scale, matrix, learn, means, gptq, learn"},
           {"quarot-gptaq-w2a16-g64", "hadamard, gptaq"},
           {"fbquant-block-w3a16-g64-r16", "rtn + fbquant rank 16, learn"},
           {"autoround-w4a16-g64", "rtn, learn"},
           {"awq-w4a16-g64", "search, rtn"},
           {"flatquant-w4a4kv4", "smooth, kronecker, matrix, learn, rtn"},
           {"roste-choice-w4a4kv4", "hadamard, choose by rounding_error, gptq"},
           {"two-pass-w4a4kv4", "hadamard, means, gptq, learn"}}) {
    EXPECT_EQ(describe_method(Recipe::read(name)), method);
  }
}

TEST(Recipe, EveryFieldSurvivesTheRoundTrip) {
  const json original = json::parse(R"({
    "name": "everything",
    "dtype": "bfloat16",
    "grids": {
      "weights": {"num_bits": 3, "symmetric": false, "strategy": "group", "group_size": 16, "dynamic": false,
                  "scale_dtype": "bfloat16"},
      "input_activations": {"num_bits": 6, "symmetric": true},
      "kv_cache": {"num_bits": 3, "symmetric": true},
      "head": {"num_bits": 8, "symmetric": true, "strategy": "channel", "dynamic": false, "scale_dtype": "float16"},
      "embedding": {"num_bits": 4, "symmetric": false, "strategy": "group", "group_size": 8, "dynamic": false,
                    "scale_dtype": "float32"}},
    "token_weights": "inverse_energy",
    "calibration": {"num_samples": 5, "seq_len": 6, "activations_dtype": "bfloat16", "shards": 2,
                    "matmul_precision": "medium"},
    "passes": [
      {"steps": [
        {"step": "transform", "kind": "hadamard", "at": ["residual", "query_key"]},
        {"step": "transform", "kind": "balance", "at": ["down"]},
        {"step": "transform", "kind": "coarse_to_fine", "at": ["qkv"]},
        {"step": "transform", "kind": "smooth", "at": ["o"], "strength": 0.25},
        {"step": "transform", "kind": "search", "at": ["gate_up"]},
        {"step": "transform", "kind": "scale", "at": ["value"]},
        {"step": "transform", "kind": "matrix", "at": ["value"], "start": "random", "block_size": 0},
        {"step": "transform", "kind": "matrix", "at": ["o"], "start": "greedy", "block_size": 4},
        {"step": "transform", "kind": "permutation", "at": ["o"], "block_size": 4},
        {"step": "transform", "kind": "kronecker", "at": ["down"], "start": "hadamard", "left_only": true},
        {"step": "choose", "at": ["gate_up"], "by": "rms", "threshold": 2.5,
         "from": [{"transforms": []},
                  {"transforms": [{"kind": "smooth", "strength": 0.75},
                                  {"kind": "matrix", "start": "random", "block_size": 8}]}]},
        {"step": "points", "at": ["qkv", "o", "gate_up", "down"], "clip": 0.8, "shift": "mean", "stream": "quantized",
         "runtime": {"group": 8, "span": "window"}},
        {"step": "points", "at": ["k_cache", "v_cache"], "clip": 0.7, "shift": "none", "stream": "full_precision",
         "runtime": null},
        {"step": "learn", "name": "first", "loss": "mse", "weights": "straight_through", "rounded_share": 0.5,
         "epochs": 2, "steps": 7,
         "rule": "sign", "schedule": "linear",
         "rates": {"value.matrix": 0.1, "*.scale": 0.2, "o.clip": 0.3},
         "final_rate": 0.5, "stream": "quantized", "products": "float32", "batch_size": 2, "num_monitored": 3},
        {"step": "round", "method": "gptq", "clip": "none", "clip_norm": 2.0, "block_size": 32, "damping": 0.05,
         "activation_order": false, "static_groups": false, "compensate_streams": true, "cross_strength": 0.75,
         "first_order": 0.125, "quantized_inputs": true, "low_rank": null}]},
      {"steps": [
        {"step": "round", "method": "rtn", "clip": "hqq", "clip_norm": 2.4, "block_size": 128, "damping": 0.01,
         "activation_order": true, "static_groups": true, "compensate_streams": false, "cross_strength": 0.25,
         "first_order": 0.0, "quantized_inputs": false, "low_rank": {"method": "fbquant", "rank": 7,
                                                 "dtype": "int8", "start": "svd", "steps": 9, "learning_rate": 0.7}},
        {"step": "learn", "name": "second", "loss": "mse", "weights": "rounded", "epochs": 1, "steps": 0,
         "rule": "adam", "schedule": "constant",
         "rates": {"*.low_rank": 0.1, "mlp.up_proj.low_rank": 0.4, "*.gain": 0.2, "*.shift": 0.3},
         "final_rate": 0.0, "stream": "full_precision", "products": "float16", "batch_size": 1,
         "num_monitored": 4}]},
      {"window": 3, "stride": 2, "steps": [
        {"step": "learn", "name": "pairs", "loss": "mse_kl", "weights": "rounded", "epochs": 1, "steps": 0,
         "rule": "adam", "schedule": "constant", "rates": {"*.weight_offset": 0.1}, "rank": 5, "final_rate": 0.0,
         "stream": "quantized", "products": "float32", "batch_size": 1, "num_monitored": 4}]},
      {"windows": "slider", "steps": []},
      {"over": "model", "steps": [
        {"step": "learn", "name": "third", "loss": "kl_top", "top_k": 30, "weights": "rounded", "epochs": 1,
         "steps": 0, "rule": "cayley", "schedule": "cosine",
         "rates": {"*.norm": 0.1, "final.norm": 0.2}, "final_rate": 0.0, "stream": "full_precision",
         "products": "float32", "batch_size": 1, "num_monitored": 4}]}]
  })");
  EXPECT_EQ(Recipe::from_json(original, "recipe.json").to_json(), original);
}

TEST(Recipe, ThePrecisionOfCalibrationIsWrittenOutWhereItIsSaid) {
  const auto with = [](const std::string& value) {
    return R"({"calibration": {"matmul_precision": )" + value + R"(}, "steps": []})";
  };
  EXPECT_EQ(recipe_of(R"({"steps": []})").matmul_precision, MatmulPrecision::kHighest);
  EXPECT_EQ(recipe_of(with(R"("high")")).matmul_precision, MatmulPrecision::kHigh);
  EXPECT_EQ(recipe_of(with(R"("medium")")).to_json()["calibration"]["matmul_precision"], "medium");
  EXPECT_FALSE(recipe_of(with(R"("highest")")).to_json()["calibration"].contains("matmul_precision"));
  expect_refused(with(R"("bfloat16")"), {"calibration.matmul_precision", "bfloat16", "medium"});
  expect_refused(with("2"), {"calibration.matmul_precision", "got 2"});
}

TEST(Recipe, BuiltInCodeIsTheOneThatIsRead) {
  Recipe built{.name = "built"};
  built.grids = {.weights = QuantSpec{.num_bits = 3}, .input_activations = Grids::kPerToken, .kv_cache = {}};
  built.passes = {Pass{{TransformStep{.at = {Site::kResidual, Site::kDown}},
                        PointsStep{.at = {Site::kQkv, Site::kO, Site::kGateUp, Site::kDown}, .clip = 0.9},
                        RoundStep{.method = RoundStep::Method::kGptq}, LearnStep{.rates = {{"*.gain", 3e-3}}}}}};
  built.validate();
  const Recipe read = recipe_of(R"({
    "name": "built", "grids": {"weights": {"num_bits": 3}, "input_activations": {}},
    "steps": [{"step": "transform", "kind": "hadamard", "at": ["residual", "down"]},
              {"step": "points", "at": ["*"], "clip": 0.9},
              {"step": "round", "method": "gptq"},
              {"step": "learn", "rates": {"*.gain": 3e-3}}]})");
  EXPECT_EQ(built.to_json(), read.to_json());
  EXPECT_EQ(Recipe().to_json(), recipe_of("{}").to_json());
}

TEST(Recipe, BuiltInCodeIsHeldToTheSameRules) {
  const auto refused = [](const auto& change, const std::vector<std::string>& parts) {
    Recipe recipe{.name = "mine"};
    recipe.grids.weights = QuantSpec{};
    recipe.passes[0].steps = {RoundStep{}};
    recipe.validate();
    change(recipe);
    expect_error([&] { recipe.validate(); }, parts);
  };
  refused([](Recipe& r) { r.passes[0].steps.clear(); }, {"recipe \"mine\": grids.weights: no step rounds to it"});
  refused([](Recipe& r) { r.passes.clear(); }, {"recipe \"mine\": passes: expected at least one"});
  refused([](Recipe& r) { r.passes[0].steps.emplace_back(LearnStep{}); }, {"recipe \"mine\": steps[1].rates"});
  refused([](Recipe& r) { r.grids.weights->num_bits = 1; }, {"grids.weights.num_bits", "from 2 to 8, got 1"});
  refused([](Recipe& r) { r.grids.weights->strategy = Strategy::kToken; }, {"grids.weights: expected strategy"});
  refused([](Recipe& r) { r.grids.input_activations = QuantSpec{}; }, {"grids.input_activations", "per token"});
  refused([](Recipe& r) { r.grids.kv_cache = Grids::kPerToken; }, {"grids.kv_cache", "per token and head"});
  refused([](Recipe& r) { std::get<RoundStep>(r.passes[0].steps[0]).gptq.damping = 2; },
          {"steps[0].damping: expected a number from 0 to 1, got 2"});
  refused(
      [](Recipe& r) {
        std::get<RoundStep>(r.passes[0].steps[0]).gptq.damping = std::numeric_limits<double>::quiet_NaN();
      },
      {"damping", "nan"});
  refused([](Recipe& r) { r.dtype = at::kDouble; }, {"Double"});
  refused([](Recipe& r) { r.seq_len = 1; }, {"calibration.seq_len", "got 1"});
}

TEST(Recipe, TheEmptyRecipeLeavesTheModelAsItIs) {
  const Recipe recipe = Recipe::from_json(json::object(), "recipe.json");
  EXPECT_FALSE(recipe.needs_calibration());
  EXPECT_EQ(recipe.round_step(), nullptr);
  EXPECT_EQ(recipe.passes.size(), 1U);
  EXPECT_EQ(recipe.quantization_config(), QuantizationConfig{});
}

TEST(Recipe, ErrorsNameStepAndKey) {
  expect_refused(R"({"wieghts": {}})", {"recipe.json: unknown key \"wieghts\""});
  expect_refused(R"({"grids": {"weigths": {}}})", {"recipe.json: grids: unknown key \"weigths\""});
  expect_refused(R"({"grids": {"weights": {"bits": 4}}})", {"recipe.json: grids.weights: unknown key \"bits\""});
  expect_refused(R"({"grids": {"input_activations": {"clip": 1}}})", {"grids.input_activations: unknown key \"clip\""});
  expect_refused(R"({"grids": {"kv_cache": {"group_size": 8}}})", {"grids.kv_cache: unknown key \"group_size\""});
  expect_refused(R"({"calibration": {"samples": 1}})", {"recipe.json: calibration: unknown key \"samples\""});
  expect_refused(with_weights(R"({"step": "round", "methd": "rtn"})"),
                 {"recipe.json: steps[0]: unknown key \"methd\""});
  expect_refused(with_weights(R"({"step": "round", "low_rank": {"r": 1}})"), {"steps[0].low_rank: unknown key \"r\""});
  expect_refused(with_weights(kRound + R"(, {"step": "learn", "lr": 1})"), {"steps[1]: unknown key \"lr\""});
  expect_refused(with_weights(kRound + R"(, {"step": "points", "at": [], "norm_shift": "mean"})"),
                 {"steps[1]: unknown key \"norm_shift\""});
  expect_refused(with_weights(R"({"step": "transform", "kind": "scale", "at": ["down"], "strength": 0.5})"),
                 {"steps[0]: unknown key \"strength\""});
  expect_refused(R"({"passes": [{"steps": []}, {"steps": [{"step": "learn", "epochs": -1}]}]})",
                 {"recipe.json: passes[1].steps[0].epochs: expected an integer", "-1"});
  expect_refused(R"({"passes": [{"step": []}]})", {"recipe.json: passes[0]: unknown key \"step\""});
  expect_refused(R"({"steps": [{"kind": "hadamard"}]})", {"steps[0].step: missing", "\"transform\""});
  expect_refused(R"({"steps": [{"step": "rotate"}]})", {"steps[0].step", "rotate"});
  expect_refused(R"({"steps": {}})", {"recipe.json: steps: expected an array of objects"});
  expect_refused(R"({"steps": [[]]})", {"recipe.json: steps[0]: expected an object"});
  expect_refused(R"({"steps": [], "passes": []})", {"recipe.json: steps and passes exclude each other"});
  expect_refused(R"({"passes": []})", {"recipe.json: passes: expected at least one"});
  expect_refused(R"([])", {"recipe.json", "object"});
}

TEST(Recipe, ImpossibleValuesAreNamedWithTheirPath) {
  const auto grid = [](const std::string& keys) { return R"({"grids": {"weights": {)" + keys + "}}}"; };
  expect_refused(grid(R"("num_bits": 1)"), {"recipe.json: grids.weights.num_bits", "1"});
  expect_refused(grid(R"("num_bits": "four")"), {"grids.weights.num_bits", "\"four\""});
  expect_refused(grid(R"("strategy": "group")"), {"grids.weights: group_size"});
  expect_refused(grid(R"("group_size": 64)"), {"grids.weights: group_size"});
  expect_refused(grid(R"("strategy": "token")"), {"grids.weights", "strategy"});
  expect_refused(grid(R"("dynamic": true)"), {"grids.weights", "static"});
  expect_refused(grid(R"("scale_dtype": "int8")"), {"grids.weights.scale_dtype", "int8"});
  expect_refused(R"({"grids": {"weights": 4}})", {"grids.weights", "object"});
  expect_refused(R"({"grids": {"input_activations": {"num_bits": 9}}})", {"grids.input_activations.num_bits"});
  const auto round = [](const std::string& keys) { return with_weights(R"({"step": "round", )" + keys + "}"); };
  expect_refused(round(R"("method": "awq")"), {"steps[0].method", "awq"});
  expect_refused(round(R"("clip": true)"), {"steps[0].clip", "\"search\"", "true"});
  expect_refused(round(R"("damping": -1)"), {"steps[0].damping", "-1"});
  expect_refused(round(R"("low_rank": {"rank": 0})"), {"steps[0].low_rank.rank", "0"});
  expect_refused(round(R"("low_rank": {"method": "lora"})"), {"steps[0].low_rank.method", "lora"});
  expect_refused(round(R"("low_rank": {"dtype": "int4"})"), {"steps[0].low_rank.dtype", "int4"});
  const auto points = [](const std::string& keys) { return with_grids(R"({"step": "points", )" + keys + "}"); };
  expect_refused(points(R"("at": ["*"], "clip": 1.5)"), {"steps[0].clip", "1.5"});
  expect_refused(points(R"("at": ["*"], "shift": "median")"), {"steps[0].shift", "median"});
  expect_refused(points(R"("at": ["residual"])"), {"steps[0].at", "\"residual\"", "\"k_cache\""});
  expect_refused(points(R"("at": ["value"])"), {"steps[0].at", "\"value\"", "\"v_cache\""});
  expect_refused(points(R"("at": "down")"), {"steps[0].at", "array"});
  expect_refused(points(R"("clip": 1)"), {"steps[0].at: missing"});
  expect_refused(R"({"steps": [{"step": "transform", "at": ["k_cache"]}]})",
                 {"steps[0].at", "\"k_cache\"", "\"value\""});
  expect_refused(R"({"steps": [{"step": "transform"}]})", {"steps[0].at: missing"});
  expect_refused(R"({"steps": [{"step": "transform", "kind": "fourier", "at": ["o"]}]})", {"steps[0].kind", "fourier"});
  expect_refused(R"({"steps": [{"step": "transform", "kind": "smooth", "at": ["o"], "strength": 2}]})",
                 {"steps[0].strength", "2"});
  const auto learn = [](const std::string& keys) {
    return with_grids(kPoints + ", " + kRound + R"(, {"step": "learn", "rates": {"*.clip": 1}, )" + keys + "}");
  };
  expect_refused(learn(R"("weights": "frozen")"), {"steps[2].weights", "frozen"});
  expect_refused(learn(R"("products": "int8")"), {"steps[2].products", "int8"});
  expect_refused(learn(R"("stream": "both")"), {"steps[2].stream", "both"});
  expect_refused(with_weights(kRound + R"(, {"step": "learn", "rates": {"*.clip": 11}})"),
                 {"steps[1].rates.*.clip", "11"});
  expect_refused(with_weights(kRound + R"(, {"step": "learn", "rates": [1]})"), {"steps[1].rates", "object"});
  expect_refused(R"({"calibration": {"seq_len": 1}})", {"calibration.seq_len", "1"});
  expect_refused(R"({"calibration": {"activations_dtype": "float16"}})", {"calibration.activations_dtype", "float16"});
  expect_refused(R"({"token_weights": "mse"})", {"recipe.json: token_weights", "mse"});
  expect_refused(R"({"dtype": "int4"})", {"dtype", "int4"});
}

TEST(Recipe, NullCountsAsAbsent) {
  EXPECT_EQ(recipe_of(R"({"steps": null, "grids": null, "calibration": null})").to_json(), Recipe().to_json());
  const Recipe recipe = recipe_of(with_weights("null, " + kRound));
  EXPECT_EQ(recipe.passes[0].steps.size(), 1U);
  // Errors count the steps of the file.
  expect_refused(with_weights("null, " + kRound + ", " + kRound), {"recipe.json: steps[2].step", "twice"});
}

TEST(Recipe, AStarIsEveryPointThatTheGridsQuantize) {
  const auto at = [](const std::string& grids) {
    const Recipe recipe = recipe_of(R"({"grids": {)" + grids + R"(}, "steps": [{"step": "points", "at": ["*"]}]})");
    return recipe.steps_of<PointsStep>().at(0)->at;
  };
  EXPECT_EQ(at(""), std::vector<Site>{});
  EXPECT_EQ(at(R"("kv_cache": {})"), (std::vector{Site::kQueryKey, Site::kValue}));
  EXPECT_EQ(at(R"("input_activations": {})"), (std::vector{Site::kQkv, Site::kO, Site::kGateUp, Site::kDown}));
}

TEST(Recipe, ActivationStreamsAreOfTheTypesThatTheirStorageHas) {
  for (const at::ScalarType dtype : ActivationStorage::kDtypes) {
    const std::string name = dtype == at::kFloat ? "float32" : "bfloat16";
    const Recipe recipe = Recipe::from_json({{"calibration", {{"activations_dtype", name}}}}, "r");
    EXPECT_EQ(recipe.activations_dtype, dtype);
    EXPECT_EQ(ActivationStorage{.dtype = recipe.activations_dtype}.allocate({4}).scalar_type(), dtype);
  }
}

TEST(Recipe, KnowsWhetherItNeedsCalibration) {
  const auto needs = [](const std::string& text) { return recipe_of(text).needs_calibration(); };
  EXPECT_FALSE(needs(with_weights(kRound)));
  EXPECT_TRUE(needs(with_weights(R"({"step": "round", "method": "gptq"})")));
  EXPECT_FALSE(needs(with_weights(R"({"step": "round", "low_rank": {"method": "svd"}})")));
  for (const char* method : {"l2qer", "qera-approx", "qera-exact", "fbquant"}) {
    EXPECT_TRUE(needs(with_weights(R"({"step": "round", "low_rank": {"method": ")" + std::string(method) + "\"}}")))
        << method;
  }
  EXPECT_FALSE(needs(R"({"steps": [{"step": "transform", "at": ["residual", "down"]}]})"));
  EXPECT_FALSE(needs(R"({"steps": [{"step": "transform", "kind": "matrix", "at": ["value"]}]})"));
  EXPECT_TRUE(needs(R"({"steps": [{"step": "transform", "kind": "balance", "at": ["down"]}]})"));
  EXPECT_TRUE(needs(R"({"steps": [{"step": "transform", "kind": "smooth", "at": ["down"]}]})"));
  EXPECT_FALSE(needs(with_grids(kPoints + ", " + kRound)));
  EXPECT_TRUE(needs(with_grids(R"({"step": "points", "at": ["*"], "shift": "mean"}, )" + kRound)));
  EXPECT_TRUE(needs(with_grids(kPoints + ", " + kRound + ", " + learn(R"("*.clip": 1)"))));
}

TEST(Recipe, ALearnStepWithoutEpochsLearnsNothing) {
  const json learned = json::parse(with_grids(kPoints + ", " + kRound + ", " + learn(R"("*.clip": 1)")));
  EXPECT_TRUE(Recipe::from_json(learned, "r").learns());
  json skipped = learned;
  override_recipe(skipped, "steps.2.epochs", "0");
  EXPECT_FALSE(Recipe::from_json(skipped, "r").learns());
}

TEST(Recipe, AnswersWhatItsStepsDo) {
  const Recipe recipe = recipe_of(R"({
    "grids": {"weights": {}, "kv_cache": {"num_bits": 3}},
    "passes": [
      {"steps": [{"step": "transform", "at": ["residual", "down"]}, {"step": "points", "at": ["*"], "shift": "mean"},
                 {"step": "round", "method": "gptq"}]},
      {"steps": [{"step": "round", "low_rank": {"method": "svd", "rank": 5}}]}]})");
  EXPECT_TRUE(recipe.rotates_residual());
  EXPECT_TRUE(recipe.has_transform(Site::kDown));
  EXPECT_FALSE(recipe.has_transform(Site::kO));
  EXPECT_TRUE(recipe.has_mean_shift());
  EXPECT_TRUE(recipe.rounding_needs_moments());
  EXPECT_FALSE(needs_moments(*recipe.round_step()));
  EXPECT_EQ(recipe.step_path(1, 0), "passes[1].steps[0]");
  EXPECT_EQ(Recipe().step_path(0, 3), "steps[3]");
  const QuantizationConfig config = recipe.quantization_config();
  EXPECT_EQ(config.weights, recipe.grids.weights);
  EXPECT_EQ(config.kv_cache, recipe.grids.kv_cache);
  EXPECT_EQ(config.lora_rank, 5);
  EXPECT_FALSE(config.input_activations);
}

TEST(OverrideRecipe, SetsNestedValues) {
  json recipe = json::parse(R"({"grids": {"weights": {"num_bits": 4}}, "steps": [{"step": "round"}]})");
  override_recipe(recipe, "grids.weights.num_bits", "3");
  override_recipe(recipe, "steps.0.method", "gptq");
  override_recipe(recipe, "steps.0.low_rank.rank", "8");
  override_recipe(recipe, "calibration.seq_len", "64");
  override_recipe(recipe, "grids.kv_cache", "null");
  override_recipe(recipe, "name", "mine");
  EXPECT_EQ(recipe, json::parse(R"({"grids": {"weights": {"num_bits": 3}, "kv_cache": null},
                                    "steps": [{"step": "round", "method": "gptq", "low_rank": {"rank": 8}}],
                                    "calibration": {"seq_len": 64}, "name": "mine"})"));
  override_recipe(recipe, "steps.0", "null");
  EXPECT_EQ(recipe["steps"], json::array({nullptr}));
}

TEST(OverrideRecipe, NamesOfRatesKeepTheirDots) {
  json recipe = json::parse(R"({"passes": [{"steps": [{"rates": {"*.clip": 1}}]}], "rates": {}})");
  override_recipe(recipe, "passes.0.steps.0.rates.*.clip", "2");
  override_recipe(recipe, "passes.0.steps.0.rates.mlp.up_proj.low_rank", "3");
  EXPECT_EQ(recipe["passes"][0]["steps"][0]["rates"], json::parse(R"({"*.clip": 2, "mlp.up_proj.low_rank": 3})"));
}

TEST(OverrideRecipe, FillsInAnObjectThatIsNull) {
  json recipe = json::parse(R"({"grids": {"kv_cache": null}})");
  override_recipe(recipe, "grids.kv_cache.num_bits", "4");
  EXPECT_EQ(recipe, json::parse(R"({"grids": {"kv_cache": {"num_bits": 4}}})"));
}

TEST(OverrideRecipe, RefusesPathsThatLeadNowhere) {
  json recipe = json::parse(R"({"name": "x", "grids": {"weights": {"num_bits": 4}}, "steps": [{}, {"epochs": 1}]})");
  const json before = recipe;
  expect_error([&] { override_recipe(recipe, "grids.weights.num_bits.x", "3"); }, {"grids.weights.num_bits.x"});
  expect_error([&] { override_recipe(recipe, "name.x", "3"); }, {"name.x"});
  expect_error([&] { override_recipe(recipe, "steps.2.epochs", "3"); },
               {"\"steps.2.epochs\"", "steps has 2 items", "no item 2"});
  for (const char* key : {"last", "-1", "1x", "99999999999999999999999"}) {
    expect_error([&] { override_recipe(recipe, std::string("steps.") + key, "3"); }, {"steps"});
  }
  expect_error([&] { override_recipe(recipe, "steps.epochs", "3"); },
               {"\"steps.epochs\"", "steps is a list", "number", "\"epochs\""});
  EXPECT_EQ(recipe, before);
  expect_error([&] { override_recipe(recipe, "", "3"); }, {"dotted path"});
  expect_error([&] { override_recipe(recipe, "grids.", "3"); }, {"grids."});
  expect_error([&] { override_recipe(recipe, "grids..x", "3"); }, {"grids..x"});
}

}  // namespace
}  // namespace baseq
