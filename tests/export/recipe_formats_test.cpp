#include <gtest/gtest.h>

#include <algorithm>

#include "../job_of.h"
#include "../tiny_model.h"
#include "baseq/export/export_checkpoint.h"
#include "baseq/pipeline/job.h"

namespace baseq {
namespace {

using test::TempDirectory;
using test::TinyShape;

/// Sizes that fill words of codes and blocks of a GGUF file, and the vocabulary of the tokenizer that such a file
/// needs.
const TinyShape kShape{.hidden_size = 64, .intermediate_size = 96, .head_dim = 16, .vocab_size = 640};
const std::vector<std::string> kFormats = {"hf", "compressed-tensors", "gptq", "awq", "gguf", "peft"};

bool carries(const Checkpoint& checkpoint, const std::string& format) {
  try {
    plan_export(checkpoint, {.format = export_format(format)});
    return true;
  } catch (const c10::Error&) {
    return false;
  }
}

TEST(RecipeFormats, AreThoseThatPlanTheExportOfEveryBuiltInRecipeSlow) {
  const TempDirectory directory;
  test::write_checkpoint(directory / "in", kShape);
  std::filesystem::copy(std::filesystem::path(BASEQ_TEST_DATA) / "tokenizer" / "tokenizer.json",
                        directory / "in" / "tokenizer.json");
  const Checkpoint original(directory / "in");
  const Tensor windows = test::random_ids({4, 16}, kShape.vocab_size, 1);
  std::vector<std::string> found;  // formats that some recipe fits
  for (const BuiltInRecipe& built_in : built_in_recipes()) {
    SCOPED_TRACE(std::string(built_in.name));
    const Recipe recipe = Recipe::read(std::string(built_in.name));
    quantize(test::job_of(original, test::shortened(recipe), windows, directory / "out", {.output = {.force = true}}));
    const Checkpoint quantized(directory / "out");
    const std::vector<std::string> said = export_formats(recipe);
    for (const std::string& format : kFormats) {
      EXPECT_EQ(carries(quantized, format), std::ranges::find(said, format) != said.end()) << format;
    }
    found.insert(found.end(), said.begin(), said.end());
  }
  for (const std::string& format : kFormats) EXPECT_NE(std::ranges::count(found, format), 0) << format;
}

}  // namespace
}  // namespace baseq
