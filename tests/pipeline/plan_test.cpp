#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "../job_of.h"
#include "../tiny_model.h"
#include "baseq/pipeline/job.h"
#include "pipeline/footprint.h"
#include "quant/bfloat16_product.h"
#include "quant/instruction_set.h"

namespace baseq {
namespace {

using nlohmann::json;
using test::TempDirectory;
using test::TinyShape;

Recipe planned_recipe(const json& recipe) { return Recipe::from_json(recipe, "recipe"); }

/// A recipe of weights alone.
json rounded(int64_t num_bits, const json& round = json::object()) {
  json step = {{"step", "round"}};
  step.update(round);
  return {{"grids", {{"weights", {{"num_bits", num_bits}}}}}, {"steps", json::array({step})}};
}

const json kGptq = rounded(4, {{"method", "gptq"}});

/// Windows for the tiny models.
Tensor some_windows() { return test::random_ids({2, 16}, 40, 3); }

ModelConfig config_of(int64_t layers) {
  TinyShape shape{.num_layers = layers};
  return ModelConfig::from_json(test::tiny_config(shape), "config.json");
}

TEST(Plan, FindsNothingWhereARunSucceeds) {
  for (const TinyShape& shape : test::tiny_shapes()) {
    SCOPED_TRACE(shape.name);
    const TempDirectory directory;
    test::write_checkpoint(directory / "in", shape);
    const Checkpoint checkpoint(directory / "in");
    const Tensor windows = test::random_ids({4, 16}, shape.vocab_size, 3);
    const RunPlan plan = baseq::plan(test::job_of(checkpoint, planned_recipe(kGptq), windows, directory / "out"));
    EXPECT_TRUE(plan.problems.empty()) << plan.problems.front();
    EXPECT_GT(plan.memory.bytes(), kProcessBytes);
  }
}

TEST(Plan, OneProblemDoesNotHideTheOthers) {
  const TempDirectory directory;
  auto tensors = test::tiny_tensors({}, 1);
  tensors["model.layers.1.mlp.up_proj.weight"] = at::zeros({3, 5});
  tensors["model.layers.0.mlp.up_proj.weight"] = at::zeros({48, 32}, at::kInt);
  test::write_checkpoint(directory / "in", test::tiny_config({}), tensors);
  json recipe = kGptq;
  recipe["grids"]["weights"] = {{"strategy", "group"}, {"group_size", 32}};
  const RunPlan plan = baseq::plan(
      test::job_of(directory / "in", planned_recipe(recipe), at::full({1, 4}, -1, at::kLong), directory / "in"));
  std::string all;
  for (const std::string& problem : plan.problems) all += problem + "\n";
  for (const char* part : {"is the model itself", "layers.1.mlp.up_proj.weight: shape is [3, 5]",
                           "layers.0.mlp.up_proj.weight: dtype is I32",
                           "grids.weights.group_size: 32 does not divide 48", "mlp.down_proj", "from -1 to -1"}) {
    EXPECT_NE(all.find(part), all.npos) << part << " in\n" << all;
  }
  EXPECT_EQ(plan.problems.size(), 5U) << all;
}

TEST(Plan, SizesThatNoModelHasAreAProblemAtOnce) {
  // The search for a Hadamard matrix of twice a prime near 2^30 would go through all numbers up to it, and the product
  // of the heads through 5e17.
  const TempDirectory directory;
  test::write_checkpoint(directory / "in", TinyShape{});
  json recipe = kGptq;
  const json transform = {{"step", "transform"}, {"at", {"residual", "o", "down"}}};
  recipe["steps"].insert(recipe["steps"].begin(), transform);
  for (const auto& [heads, head_dim, ffn] :
       {std::tuple(1073741789, 1073741818, 48), std::tuple(1 << 15, 1 << 15, 48), std::tuple(4, 8, 1073741818)}) {
    json config = test::tiny_config({});
    config["num_attention_heads"] = config["num_key_value_heads"] = heads;
    config["head_dim"] = head_dim;
    config["intermediate_size"] = ffn;
    test::write_bytes(directory / "in" / "config.json", config.dump());
    const RunPlan plan = baseq::plan(test::job_of(directory / "in", planned_recipe(recipe), {}, directory / "out"));
    ASSERT_EQ(plan.problems.size(), 1U);
    EXPECT_NE(plan.problems[0].find("1048576"), std::string::npos) << plan.problems[0];
  }
  // The largest that is read: quick, and nothing overflows.
  json config = test::tiny_config({});
  config["num_attention_heads"] = config["num_key_value_heads"] = 2;
  config["head_dim"] = 1 << 19;
  config["hidden_size"] = config["intermediate_size"] = 1048573;
  config["num_hidden_layers"] = 1 << 12;
  test::write_bytes(directory / "in" / "config.json", config.dump());
  const RunPlan plan = baseq::plan(test::job_of(directory / "in", planned_recipe(recipe), {}, directory / "out"));
  EXPECT_GT(plan.memory.bytes(), int64_t{1} << 40);
  EXPECT_FALSE(plan.problems.empty());
}

TEST(Plan, AQuantizedCheckpointIsAProblem) {
  const TempDirectory directory;
  test::write_checkpoint(directory / "in", TinyShape{});
  quantize(test::job_of(directory / "in", planned_recipe(rounded(8)), {}, directory / "out"));
  const RunPlan plan =
      baseq::plan(test::job_of(directory / "out", planned_recipe(kGptq), some_windows(), directory / "again"));
  ASSERT_EQ(plan.problems.size(), 1U);
  EXPECT_NE(plan.problems[0].find("already quantized"), std::string::npos);
}

TEST(Plan, OtherWindowsThanTheRecipeAsksForAreAWarning) {
  const TempDirectory directory;
  test::write_checkpoint(directory / "in", TinyShape{});
  Job job{.model = directory / "in",
          .recipe = planned_recipe(kGptq),
          .windows = some_windows(),
          .output = directory / "out"};
  const RunPlan other = baseq::plan(job);
  ASSERT_EQ(other.warnings.size(), 1U);
  EXPECT_NE(other.warnings[0].find("2 windows of 16 tokens, but the recipe asks for 128 of 2048"), std::string::npos);
  job.recipe.num_samples = 2;
  job.recipe.seq_len = 16;
  EXPECT_TRUE(baseq::plan(job).warnings.empty());
}

TEST(Plan, WindowsThatAreMissingAndAModelThatIsNotThereAreProblems) {
  const TempDirectory directory;
  test::write_checkpoint(directory / "in", TinyShape{});
  Job job{.model = directory / "in", .recipe = planned_recipe(kGptq), .output = directory / "out"};
  const RunPlan without = baseq::plan(job);
  ASSERT_EQ(without.problems.size(), 1U);
  EXPECT_NE(without.problems[0].find("needs calibration `windows`"), std::string::npos) << without.problems[0];
  EXPECT_GT(without.memory.bytes(), kProcessBytes);
  job.model = directory / "nowhere";
  const RunPlan nowhere = baseq::plan(job);
  ASSERT_EQ(nowhere.problems.size(), 1U);
  EXPECT_NE(nowhere.problems[0].find("nowhere"), std::string::npos) << nowhere.problems[0];
}

std::string text_of(const std::vector<std::string>& sentences) {
  std::string text;
  for (const std::string& sentence : sentences) text += sentence + "\n";
  return text;
}

TEST(Plan, WeightsThatAreNotFiniteAreNamed) {
  for (const TinyShape& shape : test::tiny_shapes()) {
    SCOPED_TRACE(shape.name);
    const TempDirectory directory;
    auto tensors = test::tiny_tensors(shape, 1);
    const bool fused = tensors.contains("model.layers.1.mlp.gate_up_proj.weight");
    const std::string up = std::string("model.layers.1.mlp.") + (fused ? "gate_up_proj" : "up_proj") + ".weight";
    tensors.at(up)[3][5] = std::numeric_limits<float>::quiet_NaN();
    tensors.at(up)[0][0] = -std::numeric_limits<float>::infinity();
    tensors.at("model.layers.0.input_layernorm.weight")[1] = std::numeric_limits<float>::infinity();
    tensors.at("model.embed_tokens.weight") = tensors.at("model.embed_tokens.weight").to(at::kBFloat16);
    tensors.at("model.embed_tokens.weight")[7][2] = std::numeric_limits<float>::quiet_NaN();
    std::vector<std::string> expected{
        "model.embed_tokens.weight: 1 of " + std::to_string(shape.vocab_size * shape.hidden_size),
        "model.layers.0.input_layernorm.weight (block 0): 1 of " + std::to_string(shape.hidden_size),
        up + " (block 1): 2 of " + std::to_string((fused ? 2 : 1) * shape.intermediate_size * shape.hidden_size)};
    if (!shape.tied) {
      tensors.at("lm_head.weight")[0][0] = std::numeric_limits<float>::quiet_NaN();
      expected.push_back("lm_head.weight: 1 of");
    }
    test::write_checkpoint(directory / "in", test::tiny_config(shape), tensors);
    const RunPlan plan = baseq::plan(test::job_of(directory / "in", planned_recipe(rounded(4)), {}, directory / "out"));
    EXPECT_EQ(plan.problems.size(), expected.size()) << text_of(plan.problems);
    for (const std::string& part : expected) {
      EXPECT_NE(text_of(plan.problems).find(part), std::string::npos) << part << " in\n" << text_of(plan.problems);
    }
  }
}

TEST(Plan, ManyWeightsThatAreNotFiniteAreCounted) {
  const TempDirectory directory;
  auto tensors = test::tiny_tensors({}, 1);
  for (auto& [name, tensor] : tensors) tensor = at::full_like(tensor, std::numeric_limits<float>::quiet_NaN());
  test::write_checkpoint(directory / "in", test::tiny_config({}), tensors);
  const RunPlan plan =
      baseq::plan(test::job_of(directory / "in", planned_recipe(kGptq), some_windows(), directory / "out"));
  EXPECT_EQ(plan.problems.size(), 11U);
  EXPECT_EQ(plan.problems.back(), "and 10 more tensors with NaN or infinities");
}

TEST(Plan, SaysWhereProductsOfFewerBitsAreSlower) {
  const TempDirectory directory;
  test::write_checkpoint(directory / "in", TinyShape{});
  const auto warned = [&](const char* products, int64_t epochs) {
    json recipe = rounded(4);
    recipe["steps"].push_back({{"step", "transform"}, {"kind", "scale"}, {"at", {"down"}}});
    recipe["steps"].push_back({{"step", "learn"},
                               {"weights", "straight_through"},
                               {"rates", {{"*.scale", 0.01}}},
                               {"products", products},
                               {"epochs", epochs}});
    std::rotate(recipe["steps"].begin(), recipe["steps"].begin() + 1, recipe["steps"].end());
    const RunPlan plan = baseq::plan(test::job_of(directory / "in", planned_recipe(recipe), {}, directory / "out"));
    return text_of(plan.warnings).find("steps[1].products") != std::string::npos;
  };
  EXPECT_FALSE(warned("float32", 1));
  EXPECT_FALSE(warned("bfloat16", 0));
  EXPECT_EQ(warned("bfloat16", 1), !multiplies(at::kBFloat16));
  EXPECT_EQ(warned("float16", 1), !multiplies(at::kHalf));
}

TEST(Plan, SaysWhereCalibrationHasNoProductsOfFewerBits) {
  const TempDirectory directory;
  test::write_checkpoint(directory / "in", TinyShape{});
  const auto warnings = [&](const char* precision) {
    json recipe = kGptq;
    recipe["calibration"]["matmul_precision"] = precision;
    return text_of(
        baseq::plan(test::job_of(directory / "in", planned_recipe(recipe), some_windows(), directory / "out"))
            .warnings);
  };
  const std::string key = "calibration.matmul_precision";
  EXPECT_EQ(warnings("highest").find(key), std::string::npos);
  EXPECT_NE(warnings("high").find(key + ": \"high\" is float32 on the CPU"), std::string::npos);
  EXPECT_EQ(warnings("medium").find(key) == std::string::npos, has_bfloat16_products());
}

TEST(Plan, WhatTheOutputWouldLackIsAProblemOrAWarning) {
  const TempDirectory directory;
  auto tensors = test::tiny_tensors({}, 1);
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = at::ones({4});
  tensors["model.layers.0.self_attn.k_proj.bias"] = at::ones({16});
  tensors["model.layers.2.mlp.up_proj.weight"] = at::ones({48, 32});
  nlohmann::json config = test::tiny_config({});
  config["auto_map"] = "evil.Model";
  test::write_checkpoint(directory / "in", config, tensors);
  test::write_bytes(directory / "in/evil.py", "import os");
  std::filesystem::create_symlink("nowhere", directory / "in/tokenizer.json");
  const RunPlan plan = baseq::plan(test::job_of(directory / "in", planned_recipe(rounded(4)), {}, directory / "out"));
  EXPECT_EQ(plan.problems.size(), 3U) << text_of(plan.problems);
  for (const char* part :
       {"k_proj.bias\" is not used", "layers.2.mlp.up_proj.weight\" is not used", "link to nothing"}) {
    EXPECT_NE(text_of(plan.problems).find(part), std::string::npos) << part << " in\n" << text_of(plan.problems);
  }
  EXPECT_EQ(plan.warnings.size(), 2U) << text_of(plan.warnings);
  for (const char* part : {"inv_freq\" is not used", "\"evil.py\"", "\"config.json: auto_map\""}) {
    EXPECT_NE(text_of(plan.warnings).find(part), std::string::npos) << part << " in\n" << text_of(plan.warnings);
  }
}

/// Bytes of all files of a directory.
int64_t bytes_of(const std::filesystem::path& directory) {
  int64_t bytes = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    bytes += static_cast<int64_t>(entry.file_size());
  }
  return bytes;
}

TEST(Plan, TheDiskNeedsWhatIsWrittenAndLittleMore) {
  const json learned = json::parse(R"({
    "grids": {"weights": {}, "input_activations": {}, "kv_cache": {}},
    "steps": [{"step": "transform", "at": ["residual"]},
              {"step": "transform", "kind": "scale", "at": ["value", "o", "down"]},
              {"step": "transform", "kind": "matrix", "at": ["value"]},
              {"step": "points", "at": ["o", "down"], "shift": "mean"},
              {"step": "learn", "weights": "straight_through", "epochs": 1,
               "rates": {"*.scale": 3e-3, "*.matrix": 3e-3, "*.clip": 3e-2, "*.shift": 2e-3}},
              {"step": "points", "at": ["qkv", "gate_up", "k_cache", "v_cache"]},
              {"step": "round", "method": "gptq"},
              {"step": "learn", "epochs": 1, "rates": {"*.clip": 3e-2, "*.shift": 2e-3, "*.gain": 3e-3}}]})");
  json low_rank = rounded(3, {{"low_rank", {{"rank", 4}, {"method", "svd"}}}});
  low_rank["grids"]["weights"]["symmetric"] = false;
  std::vector<TinyShape> shapes = test::tiny_shapes();
  shapes.push_back(
      {.name = "large_and_tied", .hidden_size = 256, .intermediate_size = 512, .head_dim = 64, .vocab_size = 4096});
  for (const json& recipe : {kGptq, learned, low_rank, json::object()}) {
    for (const TinyShape& shape : shapes) {
      SCOPED_TRACE(shape.name + " " + recipe.dump());
      const TempDirectory directory;
      test::write_checkpoint(directory / "in", shape);
      test::write_bytes(directory / "in/tokenizer.json", std::string(300'000, 'x'));
      test::write_bytes(directory / "in/pytorch_model.bin", std::string(900'000, 'x'));
      const Checkpoint checkpoint(directory / "in");
      const Tensor windows = test::random_ids({4, 16}, shape.vocab_size, 3);
      const RunPlan plan = baseq::plan(test::job_of(checkpoint, planned_recipe(recipe), windows, directory / "out"));
      ASSERT_TRUE(plan.problems.empty()) << plan.problems.front();
      ASSERT_EQ(plan.disk.size(), 1U);
      quantize(test::job_of(checkpoint, planned_recipe(recipe), windows, directory / "out"));
      EXPECT_GE(plan.disk[0].bytes, bytes_of(directory / "out"));
      EXPECT_LE(plan.disk[0].bytes, bytes_of(directory / "out") * 1.2 + (64 << 10));
    }
  }
}

TEST(Footprint, MemoryDoesNotDependOnTheNumberOfBlocksButOutputDoes) {
  const RunShape shape{.num_windows = 8, .seq_len = 16};
  const Recipe recipe = planned_recipe(kGptq);
  EXPECT_EQ(quantization_memory(config_of(2), recipe, shape).bytes(),
            quantization_memory(config_of(200), recipe, shape).bytes());
  EXPECT_GT(output_bytes(config_of(2), recipe, at::kFloat).blocks, 0);
}

TEST(Footprint, StreamsOnDiskAndSmallerBatchesNeedLess) {
  const Recipe recipe = planned_recipe(kGptq);
  const auto bytes = [&](int64_t tokens, bool on_disk) {
    return quantization_memory(
               config_of(2), recipe,
               {.num_windows = 1024, .seq_len = 128, .tokens_per_batch = tokens, .activations_on_disk = on_disk})
        .bytes();
  };
  // Three streams and the one inside the block.
  EXPECT_EQ(bytes(2048, false) - bytes(2048, true), 4 * 1024 * 128 * 32 * 4);
  EXPECT_LT(bytes(512, true), bytes(2048, true));
}

TEST(Footprint, MatricesThatStayOnlineCountInMemoryOutputAndWorkDirectory) {
  const ModelConfig config = config_of(2);
  const auto recipe_with = [](TransformStep::Kind kind, Site site) {
    Recipe recipe;
    recipe.passes[0].steps = {TransformStep{.kind = kind, .at = {site}}};
    return recipe;
  };
  for (const SiteInfo& info : sites()) {
    if (info.site == Site::kResidual) continue;
    SCOPED_TRACE(info.name);
    const Recipe scale = recipe_with(TransformStep::Kind::kScale, info.site);
    const Recipe matrix = recipe_with(TransformStep::Kind::kMatrix, info.site);
    const SiteShape shape = site_shape(info.site, config);
    const int64_t blocks = info.site == Site::kQueryKey ? 1 : shape.blocks;  // there all heads share one
    const int64_t bytes = blocks * shape.width() * shape.width() * 4;
    const auto memory = [&](const Recipe& recipe) { return quantization_memory(config, recipe, {}).bytes(); };
    EXPECT_EQ(memory(matrix) - memory(scale), bytes);
    const auto output = [&](const Recipe& recipe) { return output_bytes(config, recipe, at::kFloat).blocks; };
    EXPECT_EQ(output(matrix) - output(scale), info.online ? config.num_hidden_layers * bytes : 0);
    EXPECT_EQ(stage_bytes(config, matrix), 2 * bytes);
    const auto learned = [](Recipe recipe, const char* rate) {
      recipe.passes[0].steps.emplace_back(LearnStep{.rates = {{rate, 1e-3}}});
      return recipe;
    };
    EXPECT_GT(memory(learned(matrix, "*.matrix")) - memory(learned(scale, "*.scale")), 10 * bytes);
  }
}

TEST(Footprint, TheStatesOfAllBlocksAreHeldBetweenTwoPasses) {
  const RunShape shape{.num_windows = 8, .seq_len = 16};
  const Recipe once = planned_recipe(kGptq);
  Recipe twice = once, rounded_last = once;
  twice.passes.push_back(once.passes[0]);
  rounded_last.passes.insert(rounded_last.passes.begin(), Pass{});
  const auto of_blocks = [&](const Recipe& recipe) {
    return quantization_memory(config_of(200), recipe, shape).bytes() -
           quantization_memory(config_of(100), recipe, shape).bytes();
  };
  int64_t codes = 0;
  for (const LinearShape& linear : linear_shapes(config_of(1))) codes += linear.out_features * linear.in_features;
  EXPECT_EQ(of_blocks(once), 0);
  EXPECT_EQ(of_blocks(rounded_last), 0);
  EXPECT_EQ(of_blocks(twice), 100 * codes);
}

TEST(FitMemory, TakesTheFirstThatFits) {
  const TempDirectory directory;
  test::write_checkpoint(directory / "in", TinyShape{});
  const Checkpoint checkpoint(directory / "in");
  const Recipe recipe = planned_recipe(kGptq);
  const Job job = test::job_of(checkpoint, recipe, at::zeros({4096, 128}, at::kLong), {});
  const auto fit = [&](int64_t budget) { return fit_memory(job, budget); };
  const MemoryChoice roomy = fit(int64_t{1} << 40).choice.value();
  EXPECT_FALSE(roomy.activations_on_disk);
  EXPECT_EQ(roomy.tokens_per_batch, kTokensPerBatch);
  const MemoryChoice disk = fit(roomy.bytes - 1).choice.value();
  EXPECT_TRUE(disk.activations_on_disk);
  EXPECT_EQ(disk.tokens_per_batch, kTokensPerBatch);
  const MemoryChoice small = fit(disk.bytes - 1).choice.value();
  EXPECT_LT(small.tokens_per_batch, kTokensPerBatch);
  const MemoryFit none = fit(1);
  EXPECT_FALSE(none.choice);
  EXPECT_EQ(none.smallest.tokens_per_batch, 128);
  EXPECT_LE(fit(none.smallest.bytes).choice.value().bytes, none.smallest.bytes);
}

TEST(FitMemory, IsThatOfOneProcessAndItsShareOfTheStreams) {
  const TempDirectory directory;
  test::write_checkpoint(directory / "in", TinyShape{});
  const Checkpoint checkpoint(directory / "in");
  json recipe = kGptq;
  recipe["calibration"] = {{"num_samples", 4096}, {"seq_len", 128}, {"shards", 64}};
  Job job = test::job_of(checkpoint, planned_recipe(recipe), at::zeros({4096, 128}, at::kLong), directory / "out");
  const int64_t alone = baseq::plan(job).memory.bytes(), stream = 4096 * 128 * 32 * 4;
  const MemoryChoice on_disk = fit_memory(job, alone - 1).choice.value();
  EXPECT_TRUE(on_disk.activations_on_disk);
  job.options.communicator.size = 4;
  // Three streams and the one inside the block.
  const int64_t of_four = baseq::plan(job).memory.bytes();
  EXPECT_NEAR(static_cast<double>(alone - of_four), 4 * stream * 3 / 4, 1 << 20);
  const MemoryChoice share = fit_memory(job, alone - 1).choice.value();
  EXPECT_FALSE(share.activations_on_disk);
  EXPECT_EQ(share.bytes, of_four);
  // The first process has streams of the others for a moment.
  job.options.work_directory = directory / "work";
  EXPECT_EQ(baseq::plan(job).memory.bytes(), of_four + 2 * stream);
  EXPECT_FALSE(fit_memory(job, of_four + stream / 2).choice);
}

TEST(FitMemory, NumberOfProcessesDoesNotChangeTheBatch) {
  const TempDirectory directory;
  test::write_checkpoint(directory / "in", TinyShape{});
  const Checkpoint checkpoint(directory / "in");
  json recipe = kGptq;
  recipe["calibration"] = {{"num_samples", 64}, {"seq_len", 128}, {"shards", 64}};
  Job job = test::job_of(checkpoint, planned_recipe(recipe), at::zeros({64, 128}, at::kLong), directory / "out");
  const int64_t most = baseq::plan(job).memory.bytes();
  int64_t num_alike = 0;
  for (int64_t budget = most; budget > most / 2; budget -= most / 200) {
    job.options.communicator.size = 1;
    const MemoryFit alone = fit_memory(job, budget);
    if (!alone.choice) break;
    for (const int64_t size : {2, 3, 64}) {
      job.options.communicator.size = size;
      EXPECT_EQ(fit_memory(job, budget).choice.value().tokens_per_batch, alone.choice->tokens_per_batch);
      ++num_alike;
    }
  }
  EXPECT_GT(num_alike, 3);
}

TEST(EstimateSeconds, MeasuresAndWritesNothing) {
  const TempDirectory directory;
  test::write_checkpoint(directory / "in", TinyShape{});
  const Checkpoint checkpoint(directory / "in");
  const Tensor windows = test::random_ids({6, 16}, 40, 3);
  EXPECT_GT(estimate_seconds(test::job_of(checkpoint, planned_recipe(kGptq), windows, {})), 0);
  EXPECT_GT(estimate_seconds(test::job_of(checkpoint, planned_recipe(rounded(8)), {}, {})), 0);
  EXPECT_EQ(test::list(directory.path()), std::vector<std::string>{"in"});
}

}  // namespace
}  // namespace baseq
