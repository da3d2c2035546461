#include <gtest/gtest.h>

#include "baseq/export/export_checkpoint.h"
#include "baseq/quant/gptq.h"
#include "pipeline/footprint.h"
#include "tiny_run.h"

namespace baseq {
namespace {

using nlohmann::json;
using test::expect_error;
using test::recipe_of;
using test::TinyShape;

const json kEight = {{"num_bits", 8}};
const json kGroupsOfFour = {
    {"num_bits", 4}, {"symmetric", false}, {"strategy", "group"}, {"group_size", 4}, {"scale_dtype", "bfloat16"}};

/// A recipe of head and embedding alone; null: in full precision.
Recipe recipe_of_tables(const json& head, const json& embedding, bool rotated) {
  json steps = json::array();
  if (rotated) steps.push_back({{"step", "transform"}, {"kind", "hadamard"}, {"at", {"residual"}}});
  return Recipe::from_json({{"grids", {{"head", head}, {"embedding", embedding}}}, {"steps", steps}}, "recipe");
}

Tensor rounded(const Tensor& matrix, const QuantSpec& spec) { return round_to_nearest(matrix, spec).dequantized(); }

class QuantizedTables : public test::TinyRun, public testing::WithParamInterface<TinyShape> {
 protected:
  QuantizedTables() : TinyRun(GetParam()) {}
};

TEST_P(QuantizedTables, AreTheOriginalRoundedToNearest) {
  const Model exact(*original);
  const Recipe recipe = recipe_of_tables(kEight, kGroupsOfFour, /*rotated=*/false);
  run(recipe, "out");
  const Model quantized(Checkpoint(directory / "out"));
  const Tensor table = rounded(exact.embedding(), *recipe.grids.embedding);
  EXPECT_TRUE(at::equal(quantized.embedding(), table));
  const Tensor gathered = at::embedding(table, ids);
  const double multiplier = quantized.config().embedding_multiplier;
  EXPECT_TRUE(at::equal(quantized.embed(ids), multiplier == 1 ? gathered : gathered * multiplier));
  const Linear head = quantized.lm_head();
  const double scaling = exact.config().logits_scaling;
  EXPECT_TRUE(at::allclose(head.weight * scaling, rounded(exact.lm_head().weight * scaling, *recipe.grids.head), 1e-6));
  EXPECT_EQ(head.quantized.has_value(), scaling == 1);  // the scaling is part of the weight
  if (head.quantized) {
    EXPECT_TRUE(at::equal(head.weight, head.quantized->dequantized()));
  }
  EXPECT_FALSE(quantized.config().tie_word_embeddings);
  EXPECT_FALSE(quantized.checkpoint().contains("lm_head.weight"));
  EXPECT_EQ(quantized.checkpoint().config()["quantization_config"]["format_version"], 6);
}

TEST_P(QuantizedTables, EightBitsStayCloseToTheOriginalAlsoWhenRotated) {
  for (const bool rotated : {false, true}) {
    const char* output = rotated ? "rotated" : "plain";
    run(recipe_of_tables(kEight, kEight, rotated), output);
    EXPECT_LT(test::relative_error(logits(output), logits("in")), 0.02);
    EXPECT_FALSE(at::equal(logits(output), logits("in")));
  }
}

TEST_P(QuantizedTables, AHeadThatIsTheEmbeddingStaysSoOnOneGrid) {
  run(recipe_of_tables(kEight, kEight, /*rotated=*/false), "one");
  const Checkpoint one(directory / "one");
  EXPECT_EQ(one.config()["tie_word_embeddings"], shape.tied);
  EXPECT_EQ(one.contains("lm_head.weight_packed"), !shape.tied);
  run(recipe_of_tables(kEight, nullptr, /*rotated=*/false), "two");
  const Checkpoint two(directory / "two");
  EXPECT_EQ(two.config()["tie_word_embeddings"], false);
  EXPECT_TRUE(two.contains("lm_head.weight_packed"));
  EXPECT_TRUE(at::equal(two.tensor("model.embed_tokens.weight"), original->tensor("model.embed_tokens.weight")));
}

TEST_P(QuantizedTables, StreamsStartFromTheEmbeddingThatIsWritten) {
  // Means of the inputs come from the quantized stream: they show what the first block was given.
  const auto recipe = [](const json& embedding) {
    return Recipe::from_json(
        {{"grids", {{"embedding", embedding}, {"input_activations", {{"num_bits", 8}}}}},
         {"steps", {{{"step", "points"}, {"at", {"*"}}, {"shift", "mean"}, {"stream", "quantized"}}}}},
        "recipe");
  };
  run(recipe(nullptr), "exact");
  run(recipe(kGroupsOfFour), "rounded");
  const char* shift = "model.layers.0.self_attn.input_quant.shift";
  const Tensor exact = Checkpoint(directory / "exact").tensor(shift);
  const Tensor rounded_shift = Checkpoint(directory / "rounded").tensor(shift);
  EXPECT_FALSE(at::equal(exact, rounded_shift));
  EXPECT_TRUE(at::allclose(exact, rounded_shift, 0.2, 0.2));
}

TEST_P(QuantizedTables, TheirSizeIsKnownBeforehand) {
  const Recipe recipe = recipe_of_tables(kEight, kGroupsOfFour, /*rotated=*/true);
  run(recipe, "out");
  int64_t bytes = 0;
  const Checkpoint out(directory / "out");
  for (const std::string& name : out.names()) {
    if (name.starts_with("model.layers.")) continue;
    const TensorInfo info = out.info(name);
    bytes += info.numel() * static_cast<int64_t>(c10::elementSize(info.dtype));
  }
  const Model model(*original);
  const int64_t estimate = output_bytes(model.config(), recipe, at::kFloat).surroundings;
  const Recipe nothing = recipe_of_tables(nullptr, nullptr, /*rotated=*/true);
  const int64_t dense = output_bytes(model.config(), nothing, at::kFloat).surroundings;
  const int64_t table = shape.vocab_size * shape.hidden_size * 4;
  // Both estimates have the same files and the same norm next to the tables.
  EXPECT_NEAR(static_cast<double>(estimate - dense), static_cast<double>(bytes - shape.hidden_size * 4 - 2 * table),
              16 * 128);
  EXPECT_LT(estimate, dense);
}

TEST_P(QuantizedTables, ExportsCarryThemDequantized) {
  run(recipe_of_tables(kEight, kGroupsOfFour, /*rotated=*/true), "out");
  const Checkpoint out(directory / "out");
  const ExportPlan plan = plan_export(out, {.format = ExportFormat::kHuggingFace, .dtype = at::kFloat});
  write_export(out, plan, directory / "hf");
  EXPECT_TRUE(at::equal(Model(Checkpoint(directory / "hf")).embedding(), Model(out).embedding()));
  EXPECT_LT(test::relative_error(logits("hf"), logits("out")), 1e-5);
}

INSTANTIATE_TEST_SUITE_P(Shapes, QuantizedTables, testing::ValuesIn(test::tiny_shapes()), test::shape_name);

TEST(QuantizedTables, ImpossibleGridsAreRefused) {
  for (const char* key : {"head", "embedding"}) {
    const auto with = [&](const json& grid) {
      return [=] { Recipe::from_json({{"grids", {{key, grid}}}, {"steps", json::array()}}, "recipe"); };
    };
    expect_error(with({{"strategy", "tensor"}}), {std::string("grids.") + key, "\"channel\" or \"group\""});
    expect_error(with({{"strategy", "token"}}), {std::string("grids.") + key});
    expect_error(with({{"dynamic", true}}), {std::string("grids.") + key});
    expect_error(with({{"num_bits", 9}}), {std::string("grids.") + key, "num_bits"});
  }
}

}  // namespace
}  // namespace baseq
