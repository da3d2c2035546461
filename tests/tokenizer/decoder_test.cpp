#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "baseq/tokenizer/tokenizer.h"
#include "tiny_tokenizer.h"

namespace baseq {
namespace {

using test::byte_tokenizer;
using test::Ids;
using test::json;
using test::load;

// The text of `tokens`, each with its own id.
std::string decoded(const json& decoder, const std::vector<std::string>& tokens) {
  json file = byte_tokenizer();
  file["pre_tokenizer"] = nullptr;
  file["decoder"] = decoder;
  json vocab = json::object();
  Ids ids;
  for (const std::string& token : tokens) {
    if (!vocab.contains(token)) vocab[token] = vocab.size();
    ids.push_back(vocab[token].get<int32_t>());
  }
  file["model"]["vocab"] = vocab;
  return load(file).decode(ids);
}

json strip(int start, int stop) { return {{"type", "Strip"}, {"content", " "}, {"start", start}, {"stop", stop}}; }

TEST(Decoder, ByteLevelReplacesWhatIsNoUtf8) {
  const json byte_level = {{"type", "ByteLevel"}};
  EXPECT_EQ(decoded(byte_level, {"Ġa", "Ã", "©"}), " a\u00e9");
  EXPECT_EQ(decoded(byte_level, {"<|end|>", "\u3042", "Ġ"}), "<|end|>\u3042 ");  // outside the alphabet: itself
  EXPECT_EQ(decoded(byte_level, {"Ã", "a", "ð", "Ł", "ĺ", "x"}), "\ufffda\ufffdx");
  EXPECT_EQ(decoded(byte_level, {"í", "ł", "Ģ"}), "\ufffd\ufffd\ufffd");  // a surrogate
}

TEST(Decoder, ByteFallbackReplacesEachByteOfARunThatIsNoUtf8) {
  const json byte_fallback = {{"type", "ByteFallback"}};
  EXPECT_EQ(decoded(byte_fallback, {"a", "<0xC3>", "<0xA9>", "<0x20>", "b"}), "a\u00e9 b");
  EXPECT_EQ(decoded(byte_fallback, {"<0xC3>", "<0x41>", "b", "<0xc3>"}), "\ufffd\ufffdb\ufffd");
  EXPECT_EQ(decoded(byte_fallback, {"<0xG1>", "<0x1>", "<0x+A>"}), "<0xG1><0x1>\n");
}

TEST(Decoder, StepsWorkOnTokensUntilTheyAreFused) {
  const json spaces = {{"type", "Replace"}, {"pattern", {{"String", "_"}}}, {"content", " "}};
  const auto sequence = [](const json& steps) -> json { return {{"type", "Sequence"}, {"decoders", steps}}; };
  EXPECT_EQ(decoded(sequence({spaces, strip(1, 0)}), {"_a", "__b", "c_"}), "a bc ");
  EXPECT_EQ(decoded(sequence({spaces, {{"type", "Fuse"}}, strip(1, 0)}), {"_a", "__b", "c_"}), "a  bc ");
  EXPECT_EQ(decoded(sequence({spaces, strip(0, 5)}), {"_a_", "__"}), " a");
}

TEST(Decoder, MetaspaceTakesTheFirstTokensReplacementsUnlessNonePrepends) {
  const auto metaspace = [](const std::string& scheme) -> json {
    return {{"type", "Metaspace"}, {"replacement", "_"}, {"prepend_scheme", scheme}, {"split", true}};
  };
  EXPECT_EQ(decoded(metaspace("always"), {"_a_", "_b"}), "a b");
  EXPECT_EQ(decoded(metaspace("first"), {"_a", "_b"}), "a b");
  EXPECT_EQ(decoded(metaspace("never"), {"_a", "_b"}), " a b");
}

TEST(Decoder, TextsDoNotGrowWithoutEnd) {
  json steps = json::array();
  for (int i = 0; i < 40; ++i) {
    steps.push_back({{"type", "Replace"}, {"pattern", {{"String", "a"}}}, {"content", "aa"}});
  }
  const json doubles = {{"type", "Sequence"}, {"decoders", steps}};
  EXPECT_EQ(decoded(doubles, {"b", "c"}), "bc");
  EXPECT_NE(test::error_of([&] {
              decoded(doubles, {"a", "a"});
            }).find("a text of 2 bytes becomes one of more than 32"),
            std::string::npos);
}

TEST(Decoder, WithoutOneTokensAreJoinedBySpaces) { EXPECT_EQ(decoded(nullptr, {"a", "b", "a"}), "a b a"); }

}  // namespace
}  // namespace baseq
