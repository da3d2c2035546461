#include "runtime/text_stream.h"

#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <random>
#include <set>

#include "../tokenizer/tiny_tokenizer.h"
#include "tokenizer/unicode.h"

namespace baseq {
namespace {

using test::Ids;
using test::json;

json sequence_of(const json& steps) { return {{"type", "Sequence"}, {"decoders", steps}}; }

// Tokens as Llama 2 has them: bytes, words with a space in front, a special one.
json llama_tokenizer(const json& decoder) {
  json file = test::byte_fallback_tokenizer();
  int32_t id = 256;
  for (const char* token : {"▁", "▁a", "b", "▁▁c", "é", "▁größe"}) file["model"]["vocab"][token] = id++;
  file["added_tokens"] = {test::added_token("<s>", id)};
  file["decoder"] = decoder;
  return file;
}

json replace(const char* from, const char* to) {
  return {{"type", "Replace"}, {"pattern", {{"String", from}}}, {"content", to}};
}
json strip(int start, int stop) { return {{"type", "Strip"}, {"content", " "}, {"start", start}, {"stop", stop}}; }
json step(const char* type) { return {{"type", type}}; }

std::string expect_stream(const Tokenizer& tokenizer, const Ids& ids) {
  TextStream stream(tokenizer);
  std::string text;
  for (const int32_t id : ids) {
    const std::string piece = stream.push(id);
    EXPECT_EQ(find_invalid_utf8(piece), std::string::npos);
    text += piece;
  }
  const std::string rest = stream.finish();
  EXPECT_EQ(find_invalid_utf8(rest), std::string::npos);
  EXPECT_EQ(stream.finish(), "");
  EXPECT_EQ(text + rest, tokenizer.decode(ids, /*skip_special_tokens=*/true));
  return text;
}

TEST(TextStream, PiecesTogetherAreTheDecodedText) {
  json byte_level = test::byte_tokenizer({{"a", "b"}, {"Ã", "©"}, {"ã", "ģ"}, {"ab", "Ã"}});
  byte_level["added_tokens"] = {test::added_token("<|end|>", 260)};
  const json fused = sequence_of({replace("▁", " "), step("ByteFallback"), step("Fuse"), strip(1, 0)});
  const json metaspace = {{"type", "Metaspace"}, {"replacement", "▁"}, {"prepend_scheme", "always"}, {"split", true}};
  const json stripped = sequence_of({replace("▁", " "), step("ByteFallback"), step("Fuse"), strip(2, 3)});
  const json across = sequence_of({step("ByteFallback"), step("Fuse"), replace("b▁", "-")});
  std::mt19937 random(3);
  for (const json& file : {byte_level, llama_tokenizer(fused), llama_tokenizer(metaspace), llama_tokenizer(stripped),
                           llama_tokenizer(across)}) {
    const Tokenizer tokenizer = test::load(file);
    for (int i = 0; i < 300; ++i) {
      Ids ids(random() % 40);
      // Bytes that begin and continue characters, and the tokens behind the bytes, more often than others.
      for (int32_t& id : ids) {
        switch (random() % 4) {
          case 0:
            id = static_cast<int32_t>(random() % 256);
            break;
          case 1:
            id = static_cast<int32_t>(0x80 + random() % 0x40);
            break;
          case 2:
            id = static_cast<int32_t>(0xC0 + random() % 0x38);
            break;
          default:
            id = 256 + static_cast<int32_t>(random() % static_cast<uint32_t>(tokenizer.vocab_size() - 256));
        }
      }
      expect_stream(tokenizer, ids);
    }
  }
}

TEST(TextStream, GivesTextAsSoonAsItIsSettled) {
  const Tokenizer tokenizer = test::load(test::byte_tokenizer());
  TextStream stream(tokenizer);
  std::vector<std::string> pieces;
  for (const int32_t id : tokenizer.encode("aé\U0001f600b")) pieces.push_back(stream.push(id));
  EXPECT_EQ(pieces, (std::vector<std::string>{"a", "", "é", "", "", "", "\U0001f600", "b"}));
}

TEST(TextStream, IdsWithoutATokenAreNoText) {
  const Tokenizer tokenizer = test::load(test::byte_tokenizer());
  TextStream stream(tokenizer);
  EXPECT_EQ(stream.push('a') + stream.push(99999) + stream.push(-1) + stream.push('b') + stream.finish(), "ab");
}

TEST(TextStream, BytesWaitForTheEndOfTheirRun) {
  const Tokenizer tokenizer =
      test::load(llama_tokenizer(sequence_of({replace("▁", " "), step("ByteFallback"), step("Fuse"), strip(1, 0)})));
  TextStream stream(tokenizer);
  EXPECT_EQ(stream.push(257), "a");
  EXPECT_EQ(stream.push(0xC3), "");
  EXPECT_EQ(stream.push(0xA9), "");  // 0xFF would make U+FFFD of it
  EXPECT_EQ(stream.push(258), "éb");
}

TEST(StopStrings, FindWhatAReaderOfSingleCharactersWouldFind) {
  std::mt19937 random(5);
  const auto word = [&](size_t max) {
    std::string text;
    for (size_t left = 1 + random() % max; left > 0; --left) text += static_cast<char>('a' + random() % 2);
    return text;
  };
  for (int i = 0; i < 3000; ++i) {
    std::vector<std::string> stops;
    for (size_t left = random() % 4; left > 0; --left) stops.push_back(word(5));
    const std::string text = word(30);
    std::string expected;
    bool found = false;
    for (const char c : text) {
      expected += c;
      size_t longest = 0;
      for (const std::string& stop : stops)
        longest = expected.ends_with(stop) ? std::max(longest, stop.size()) : longest;
      if (longest == 0) continue;
      expected.resize(expected.size() - longest);
      found = true;
      break;
    }
    StopStrings matcher(stops);
    std::string given;
    for (size_t begin = 0; begin < text.size();) {
      const size_t size = 1 + random() % 4;
      given += matcher.push(text.substr(begin, size));
      begin += size;
      EXPECT_TRUE(expected.starts_with(given));
    }
    EXPECT_EQ(matcher.found(), found);
    EXPECT_EQ(given + (found ? "" : matcher.finish()), expected);
  }
}

TEST(StopStrings, HoldBackOnlyWhatMayBecomeOne) {
  StopStrings matcher(std::vector<std::string>{"\nUser:"});
  EXPECT_EQ(matcher.push("one\nU"), "one");
  EXPECT_EQ(matcher.push("nix\n"), "\nUnix");
  EXPECT_EQ(matcher.push("User"), "");
  EXPECT_EQ(matcher.push(": two"), "");
  EXPECT_TRUE(matcher.found());
  EXPECT_EQ(matcher.push("more"), "");
  EXPECT_THROW(StopStrings(std::vector<std::string>{"a", ""}), c10::Error);
}

}  // namespace
}  // namespace baseq
