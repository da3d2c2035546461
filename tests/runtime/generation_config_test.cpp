#include <gtest/gtest.h>

#include "../io/temp_directory.h"
#include "../tiny_model.h"
#include "../tokenizer/tiny_tokenizer.h"
#include "baseq/runtime/generate.h"

namespace baseq {
namespace {

class GenerationConfigFile : public testing::Test {
 protected:
  GenerationConfig read(const std::string& generation_config, const nlohmann::json& fields = {}) {
    test::TinyShape shape;
    if (fields.is_object()) shape.fields = fields;
    test::write_checkpoint(directory.path(), shape);
    if (!generation_config.empty()) test::write_bytes(directory.path() / "generation_config.json", generation_config);
    return read_generation_config(Checkpoint(directory.path()));
  }
  test::TempDirectory directory;
};

TEST_F(GenerationConfigFile, SamplesOnlyWhereItSaysSo) {
  EXPECT_EQ(read("").sampling.temperature, 0);
  EXPECT_EQ(read(R"({"temperature": 0.6})").sampling.temperature, 0);
  const SamplingOptions sampling =
      read(R"({"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1,
               "repetition_penalty": 1.1, "transformers_version": "4", "max_length": 20})")
          .sampling;
  EXPECT_EQ(sampling.temperature, 0.6);
  EXPECT_EQ(sampling.top_k, 20);
  EXPECT_EQ(sampling.top_p, 0.95);
  EXPECT_EQ(sampling.min_p, 0.1);
  EXPECT_EQ(sampling.repetition_penalty, 1.1);
  EXPECT_EQ(read(R"({"do_sample": true, "top_k": null})").sampling.temperature, 1);
}

TEST_F(GenerationConfigFile, EndTokensAreOneOrSeveralAndElseThoseOfTheConfig) {
  using test::Ids;
  EXPECT_EQ(read("").eos, Ids{});
  EXPECT_EQ(read("", {{"eos_token_id", 7}}).eos, Ids{7});
  EXPECT_EQ(read(R"({"eos_token_id": [3, 4]})", {{"eos_token_id", 7}}).eos, (Ids{3, 4}));
  EXPECT_EQ(read(R"({"eos_token_id": 5})").eos, Ids{5});
}

TEST_F(GenerationConfigFile, NamesWhatIsMalformed) {
  const auto error = [&](const std::string& text) { return test::error_of([&] { read(text); }); };
  const std::string path = (directory.path() / "generation_config.json").string();
  EXPECT_EQ(error(R"({"eos_token_id": "2"})"), path + ": eos_token_id: expected token ids, got \"2\"");
  EXPECT_EQ(error(R"({"eos_token_id": [1, -2]})"), path + ": eos_token_id: expected token ids, got -2");
  EXPECT_TRUE(error(R"({"top_k": 1.5})").starts_with(path + ": top_k: expected an integer"));
  EXPECT_TRUE(error("{").starts_with(path));
}

}  // namespace
}  // namespace baseq
