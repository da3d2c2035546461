#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "../io/temp_directory.h"
#include "formats/gguf/tokenizer.h"

namespace baseq {
namespace {

TEST(GgufTokenizerJson, TokensThatAreNoUtf8AreRefused) {
  const std::filesystem::path seeds = std::filesystem::path(BASEQ_SOURCE_DIR) / "tests" / "fuzz" / "seeds" / "gguf";
  EXPECT_EQ(gguf_tokenizer_json(GgufFile(seeds / "tiny.gguf"))["model"]["vocab"].size(), 4U);
  test::expect_error([&] { gguf_tokenizer_json(GgufFile(seeds / "token_cut_in_a_character.gguf")); },
                     {"tokenizer.ggml.tokens: \"aaa", "is not valid UTF-8"});
}

}  // namespace
}  // namespace baseq
