#include <gtest/gtest.h>

#include "../counted_checkpoint.h"
#include "baseq/model/model.h"
#include "baseq/pipeline/job.h"
#include "block_test.h"
#include "pipeline/merge.h"
#include "pipeline/run_log.h"
#include "tiny_run.h"

namespace baseq {
namespace {

using nlohmann::json;
using test::expect_error;
using test::kEverything;
using test::kOnline;
using test::log_without_times;
using test::recipe_of;
using test::TempDirectory;
using test::TinyShape;
using QuantizeCheckpoint = test::TinyRun;

class QuantizeVariant : public QuantizeCheckpoint, public testing::WithParamInterface<TinyShape> {
 protected:
  QuantizeVariant() : QuantizeCheckpoint(GetParam()) {}
};

TEST_P(QuantizeVariant, EightBitsStayCloseToTheOriginal) {
  run(recipe_of(R"({"grids": {"weights": {"num_bits": 8}}, "steps": [{"step": "round", "clip": "none"}]})"), "out");
  EXPECT_LT(test::relative_error(logits("out"), logits("in")), 0.02);
  EXPECT_FALSE(at::equal(logits("out"), logits("in")));
}

TEST_P(QuantizeVariant, EverythingAtOnceRunsAndReloads) {
  for (const char* text : {kEverything, kOnline}) {
    const Recipe recipe = recipe_of(text);
    SCOPED_TRACE(recipe.name);
    int64_t finished = 0, rounded = 0;
    const ProgressFn progress = [&](const ProgressEvent& event) {
      rounded += std::holds_alternative<LinearRounded>(event);
      if (const auto* block = std::get_if<BlockFinished>(&event)) {
        EXPECT_EQ(block->block, finished++);
        EXPECT_LT(block->relative_error, 0.5);
      }
    };
    run(recipe, recipe.name.c_str(), {}, progress);
    EXPECT_EQ(finished, shape.num_layers);
    EXPECT_EQ(rounded, 7 * shape.num_layers);
    const Tensor first = logits(recipe.name.c_str());
    EXPECT_TRUE(at::isfinite(first).all().item<bool>());
    EXPECT_TRUE(at::equal(first, logits(recipe.name.c_str())));
    // 4 bits on a random model of this size: a wrong sign or a lost bias would give more than 1.
    EXPECT_LT(test::relative_error(first, logits("in")), 0.75);
  }
}

TEST_P(QuantizeVariant, EightBitsEverywhereStayClose) {
  // The same path at 8 bits leaves little: nothing but the grid separates the two models.
  for (const char* text : {kEverything, kOnline}) {
    const Recipe recipe = test::at_eight_bits(text);
    SCOPED_TRACE(recipe.name);
    run(recipe, recipe.name.c_str());
    EXPECT_LT(test::relative_error(logits(recipe.name.c_str()), logits("in")), 0.06);
  }
}

TEST_P(QuantizeVariant, ReloadedBlocksAreTheOnesThatWereMade) {
  // The blocks of an unlearned recipe, made again step by step.
  const Recipe recipe = recipe_of(R"({
    "dtype": "float32",
    "grids": {"weights": {"num_bits": 4, "symmetric": false}, "input_activations": {}, "kv_cache": {}},
    "steps": [
      {"step": "transform", "kind": "hadamard", "at": ["value", "query_key", "o", "down"]},
      {"step": "points", "at": ["qkv", "o", "gate_up", "down"], "clip": 0.9, "shift": "mean"},
      {"step": "points", "at": ["k_cache", "v_cache"], "shift": "mean"},
      {"step": "round", "method": "gptq", "low_rank": {"rank": 3}}]})");
  run(recipe, "out");
  Grids grids = recipe.grids;
  grids.kv_cache->group_size = shape.head_dim;
  const Checkpoint out(directory / "out");
  const Model quantized(out), exact(*original, {.dtype = at::kDouble});
  const RotaryEmbedding rope = test::tiny_rope(shape, 16, at::kFloat);
  BlockInputs inputs{.full_precision = exact.embed(windows).to(at::kFloat), .quantized = {}, .rope = rope};
  inputs.quantized = inputs.full_precision.clone();
  Tensor stream = Model(*original).embed(ids);
  const RotaryEmbedding short_rope = quantized.rotary(ids.size(1));
  for (int64_t i = 0; i < shape.num_layers; ++i) {
    const Tensor target = at::empty_like(inputs.full_precision);
    advance(exact.layer(i).to(at::kFloat), inputs.full_precision, target, rope);
    const Tensor weights = token_weights(target, Recipe::TokenWeights::kUniform, at::kFloat);
    const BlockTask task{.place = {exact.config(), i, at::kFloat},
                         .grids = grids,
                         .inputs = inputs,
                         .target = target,
                         .token_weights = weights};
    OpenBlock block({}, task.place, [&] { return exact.layer(i).to(at::kFloat); });
    for (const Step& step : recipe.passes[0].steps) apply_any(step, block, task);
    DecoderLayer layer = block.take_layer();
    merge_corrections(layer);
    advance(layer, inputs.quantized, inputs.quantized, rope);
    inputs.full_precision = target;

    const DecoderLayer loaded = quantized.layer(i);
    SCOPED_TRACE(i);
    test::expect_same_layer(loaded, layer);
    EXPECT_TRUE(at::equal(loaded.forward(stream, short_rope), layer.forward(stream, short_rope))) << i;
    stream = layer.forward(stream, short_rope);
  }
  const Tensor logits = quantized.lm_head().forward(quantized.final_norm().forward(stream));
  EXPECT_TRUE(at::equal(logits, quantized.logits(ids)));
}

TEST_P(QuantizeVariant, LowRankCorrectionsAreStoredAndBringTheModelCloser) {
  const json base = json::parse(
      R"({"dtype": "float32", "grids": {"weights": {"num_bits": 2}}, "steps": [{"step": "round", "clip": "none"}]})");
  std::map<std::string, double> errors;
  for (const char* rounding : {"rtn", "gptq"}) {
    for (const char* method : {"none", "svd", "l2qer", "qera-approx", "qera-exact", "fbquant"}) {
      if (method == std::string("fbquant") && rounding == std::string("gptq")) continue;
      const std::string name = std::string(rounding) + "-" + method;
      json recipe = base;
      json& round = recipe["steps"][0];
      round["method"] = rounding;
      if (name.find("none") == std::string::npos) round["low_rank"] = {{"method", method}, {"rank", 6}};
      int64_t events = 0;
      run(Recipe::from_json(recipe, name), name.c_str(), {}, [&](const ProgressEvent& event) {
        if (const auto* linear = std::get_if<LinearRounded>(&event); linear && linear->block == 0) {
          // Without calibration the error is that of the weight.
          errors[name] += linear->name == "self_attn.q_proj" ? linear->relative_error : 0;
          ++events;
        }
      });
      EXPECT_EQ(events, 7);
      const Checkpoint out(directory / name);
      const Model model(out);
      if (name.find("none") != std::string::npos) continue;
      EXPECT_EQ(model.quantization()->lora_rank, 6);
      const Linear linear = model.layer(1).mlp.down_proj;
      EXPECT_EQ(linear.lora.A.sizes(), at::IntArrayRef({6, shape.intermediate_size}));
      EXPECT_EQ(linear.lora.B.sizes(), at::IntArrayRef({shape.hidden_size, 6}));
      EXPECT_EQ(linear.lora.A.scalar_type(), at::kBFloat16);
      EXPECT_LT(test::relative_error(linear.weight - linear.quantized->dequantized(), linear.lora.product()), 1e-5);
      const std::string none = std::string(rounding) + "-none";
      EXPECT_LT(test::relative_error(logits(name.c_str()), logits("in")),
                test::relative_error(logits(none.c_str()), logits("in")))
          << name;
    }
  }
  EXPECT_LT(errors.at("rtn-svd"), errors.at("rtn-none"));
  EXPECT_LT(errors.at("rtn-qera-exact"), errors.at("rtn-qera-approx"));
  EXPECT_LT(errors.at("rtn-qera-exact"), errors.at("rtn-l2qer"));
  EXPECT_LT(errors.at("gptq-qera-exact"), errors.at("gptq-none"));
}

TEST_P(QuantizeVariant, FbquantIsWithinHalfAStepInTheFileWhateverItWasLearnedOn) {
  const json base = json::parse(R"({
    "dtype": "float32",
    "grids": {"weights": {"num_bits": 3}},
    "steps": [{"step": "round", "clip": "none", "low_rank": {"method": "fbquant", "rank": 4, "steps": 30}},
              {"step": "learn", "name": "low_rank", "rates": {"*.low_rank": 0.01}}]})");
  for (const char* dtype : {"bfloat16", "int8"}) {
    for (const int64_t block_epochs : {0, 2}) {
      json recipe = base;
      recipe["steps"][0]["low_rank"]["dtype"] = dtype;
      recipe["steps"][1]["epochs"] = block_epochs;
      const std::string name = std::string(dtype) + std::to_string(block_epochs);
      int64_t learned = 0;
      run(Recipe::from_json(recipe, name), name.c_str(), {}, [&](const ProgressEvent& event) {
        const auto* stage = std::get_if<StageLearned>(&event);
        if (!stage) return;
        ++learned;
        EXPECT_EQ(stage->stage, "low_rank");
        EXPECT_LE(stage->loss_after, stage->loss_before);
      });
      EXPECT_EQ(learned, block_epochs > 0 ? shape.num_layers : 0);
      const Checkpoint out(directory / name), in(directory / "in");
      const Model written(out), full(in);
      for (int64_t i = 0; i < shape.num_layers; ++i) {
        std::map<std::string, Tensor> weights;
        full.layer(i).for_each_linear(
            [&](const std::string& linear, const Linear& of) { weights[linear] = of.weight; });
        written.layer(i).for_each_linear([&](const std::string& linear, const Linear& of) {
          EXPECT_EQ(of.lora.A.scalar_type(), dtype == std::string("int8") ? at::kChar : at::kBFloat16);
          const Tensor steps = (of.weight - weights.at(linear)).abs() / of.quantized->qparams.scale;
          EXPECT_LE(steps.max().item<double>(), 0.5 + 1e-3) << name << " " << linear;
        });
      }
    }
  }
}

TEST_P(QuantizeVariant, ActivationsOnDiskGiveTheSameBytes) {
  const Recipe recipe = recipe_of(kEverything);
  run(recipe, "ram");
  run(recipe, "disk", {.activations_directory = directory.path()});
  expect_same_files("ram", "disk");
  for (const std::string& file : test::list(directory.path())) EXPECT_EQ(file.find("activations"), std::string::npos);
}

TEST_P(QuantizeVariant, TheLogHoldsWhatHappenedInEveryBlock) {
  std::vector<json> told;
  run(recipe_of(kEverything), "out", {}, [&](const ProgressEvent& event) { told.push_back(to_json(event)); });
  const RunRecord record = read_run_log(directory / "out" / kRunLogFile);
  ASSERT_TRUE(record.started);
  EXPECT_EQ(record.started->model, "in");
  EXPECT_EQ(record.started->num_samples, 4);
  EXPECT_EQ(record.started->seq_len, 16);
  ASSERT_EQ(static_cast<int64_t>(record.blocks.size()), shape.num_layers);
  for (const auto& [index, block] : record.blocks) {
    EXPECT_EQ(block.linears.size(), 7U);
    EXPECT_EQ(block.stages.size(), 2U);
    EXPECT_FALSE(block.epochs.empty());
    ASSERT_TRUE(block.finished);
    EXPECT_GT(block.finished->peak_memory_bytes, 0);
    ASSERT_EQ(block.points.size(), 6U);
    for (const PointMeasured& point : block.points) {
      SCOPED_TRACE(point.name);
      EXPECT_TRUE(point.enabled);
      EXPECT_FALSE(point.clip.empty());
      for (const ActivationRange& range : {point.before, point.after}) {
        EXPECT_LT(range.min, 0);
        EXPECT_GT(range.max, 0);
        EXPECT_GE(range.peak, 1);
      }
    }
  }
  // The file holds what the caller was told, but for the end of the run.
  ASSERT_EQ(told.back().at("event"), "run_finished");
  told.pop_back();
  std::vector<json> written = log_without_times(directory / "out");
  for (json& event : told) event.erase("seconds"), event.erase("peak_memory_bytes");
  EXPECT_EQ(written, told);
}

TEST_P(QuantizeVariant, Bfloat16ActivationsStayClose) {
  Recipe recipe = test::at_eight_bits(kOnline);
  recipe.activations_dtype = at::kBFloat16;
  run(recipe, "out");
  EXPECT_LT(test::relative_error(logits("out"), logits("in")), 0.06);
}

TEST_P(QuantizeVariant, SameSeedSameBytes) {
  const Recipe recipe = recipe_of(kEverything);
  run(recipe, "a", {.seed = 5});
  run(recipe, "b", {.seed = 5});
  run(recipe, "c", {.seed = 6});
  expect_same_files("a", "b");
  EXPECT_NE(test::read_bytes(directory / "a" / "model.safetensors"),
            test::read_bytes(directory / "c" / "model.safetensors"));
}

INSTANTIATE_TEST_SUITE_P(Shapes, QuantizeVariant, testing::ValuesIn(test::tiny_shapes()), test::shape_name);

TEST_F(QuantizeCheckpoint, ConfigSaysHowToRunIt) {
  const Recipe recipe = recipe_of(kOnline);
  run(recipe, "out");
  const Checkpoint out(directory / "out");
  const json& quantization = out.config().at("quantization_config");
  EXPECT_EQ(quantization.at("quant_method"), "baseq");
  // The recipe in the file can be run again.
  EXPECT_EQ(Recipe::from_json(quantization.at("recipe"), "r").to_json(), recipe.to_json());
  const Model model(out);
  const auto& config = model.quantization();
  ASSERT_TRUE(config.has_value());
  for (const SiteInfo& info : sites()) {
    EXPECT_EQ(model.online_kinds(1, info.site).size(), info.online ? 1u : 0u) << info.name;
  }
  EXPECT_EQ(config->kv_cache->group_size, shape.head_dim);
  EXPECT_EQ(out.config().at("tie_word_embeddings"), true);
  EXPECT_EQ(test::read_bytes(directory / "out" / "tokenizer.json"), "{}");
}

TEST_F(QuantizeCheckpoint, EmptyRecipeKeepsEveryLogit) {
  run(Recipe{}, "out");
  EXPECT_TRUE(at::equal(logits("out"), logits("in")));
}

TEST_F(QuantizeCheckpoint, UnquantizedMatricesTakeTheDtypeOfTheRecipe) {
  run(recipe_of(R"({"dtype": "bfloat16", "steps": [{"step": "transform", "at": ["residual"]}]})"), "out");
  const Checkpoint out(directory / "out");
  EXPECT_EQ(out.tensor("lm_head.weight").scalar_type(), at::kBFloat16);
  EXPECT_EQ(out.tensor("model.layers.0.mlp.up_proj.weight").scalar_type(), at::kBFloat16);
  EXPECT_EQ(out.tensor("model.norm.weight").scalar_type(), at::kFloat);
  EXPECT_LT(test::relative_error(logits("out"), logits("in")), 0.03);
}

TEST_F(QuantizeCheckpoint, QuantizedCheckpointIsRefused) {
  const Recipe recipe = recipe_of(test::kRoundToNearest);
  run(recipe, "out");
  const Checkpoint out(directory / "out");
  expect_error([&] { quantize(test::job_of(out, recipe, {}, directory / "twice")); }, {"already quantized"});
  EXPECT_FALSE(std::filesystem::exists(directory / "twice"));
}

TEST_F(QuantizeCheckpoint, MissingCalibrationIsRefused) {
  expect_error([&] { quantize(test::job_of(*original, recipe_of(kOnline), {}, directory / "out")); },
               {"online", "calibration"});
  EXPECT_EQ(test::list(directory.path()), std::vector<std::string>{"in"});
}

TEST_F(QuantizeCheckpoint, ExistingOutputIsRefusedWithoutForce) {
  const Recipe recipe = recipe_of(test::kRoundToNearest);
  run(recipe, "out");
  const std::string before = test::read_bytes(directory / "out" / "model.safetensors");
  expect_error([&] { run(Recipe{}, "out"); }, {"out"});
  EXPECT_EQ(test::read_bytes(directory / "out" / "model.safetensors"), before);
  run(Recipe{}, "out", {.output = {.force = true}});
  EXPECT_TRUE(at::equal(logits("out"), logits("in")));
}

TEST_F(QuantizeCheckpoint, WindowsOutsideTheVocabularyAreRefused) {
  const Tensor wrong = windows + shape.vocab_size;
  expect_error([&] { quantize(test::job_of(*original, recipe_of(kOnline), wrong, directory / "out")); },
               {"calibration windows: token ids run", "39"});
  EXPECT_EQ(test::list(directory.path()), std::vector<std::string>{"in"});
}

TEST_F(QuantizeCheckpoint, FailureLeavesNoOutput) {
  Recipe recipe = recipe_of(test::kRoundToNearest);
  recipe.grids.weights = QuantSpec{.strategy = Strategy::kGroup, .group_size = 7};
  expect_error([&] { run(recipe, "out"); }, {"7"});
  EXPECT_EQ(test::list(directory.path()), std::vector<std::string>{"in"});
}

TEST_F(QuantizeCheckpoint, EveryBlockIsReadOnce) {
  for (const char* text : {kEverything, kOnline}) {
    const Recipe recipe = recipe_of(text);
    SCOPED_TRACE(recipe.name);
    const test::CountedCheckpoint counted(*original);
    quantize(test::job_of(counted.checkpoint(), recipe, windows, directory / recipe.name));
    for (int64_t block = 0; block < shape.num_layers; ++block) {
      for (const LinearShape& linear : linear_shapes(Model(*original).config())) {
        const std::string name = layer_prefix(block) + linear.name + ".weight";
        EXPECT_EQ(counted.reads(name), 1) << name;
      }
    }
  }
}

}  // namespace
}  // namespace baseq
