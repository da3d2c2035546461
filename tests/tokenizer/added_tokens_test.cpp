#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "baseq/tokenizer/tokenizer.h"
#include "tiny_tokenizer.h"

namespace baseq {
namespace {

using test::added_token;
using test::byte_tokenizer;
using test::Ids;
using test::json;
using test::load;

// With <x> as the id 256 and one of its flags set.
Tokenizer with_flag(const std::string& flag) {
  json file = byte_tokenizer();
  file["added_tokens"] = {added_token("<x>", 256)};
  file["added_tokens"][0][flag] = true;
  return load(file);
}

TEST(AddedTokens, AreTheLongestAtTheLeftmostPlace) {
  json file = byte_tokenizer();
  const std::vector<std::string> contents = {"<a", "<a>", "a><", "\u00e9\u00e9"};
  for (int32_t i = 0; i < 4; ++i) {
    file["added_tokens"].push_back(added_token(contents[static_cast<size_t>(i)], 256 + i));
  }
  const Tokenizer tokenizer = load(file);
  EXPECT_EQ(tokenizer.vocab_size(), 260);
  EXPECT_EQ(tokenizer.encode("<a><a"), (Ids{257, 256}));
  EXPECT_EQ(tokenizer.encode("xa><a>"), (Ids{'x', 258, 'a', '>'}));
  EXPECT_EQ(tokenizer.encode("\u00e9\u00e9\u00e9"), (Ids{259, 0xC3, 0xA9}));
}

TEST(AddedTokens, SwallowWhiteSpaceOnTheSideOfTheirFlag) {
  EXPECT_EQ(with_flag("lstrip").encode("a \n\u3000<x> b"), (Ids{'a', 256, ' ', 'b'}));
  EXPECT_EQ(with_flag("rstrip").encode("a <x> \n\u3000b"), (Ids{'a', ' ', 256, 'b'}));
  EXPECT_EQ(with_flag("lstrip").encode("  <x><x>"), (Ids{256, 256}));
}

TEST(AddedTokens, OfASingleWordAreNotFoundInsideAWord) {
  const Tokenizer tokenizer = with_flag("single_word");
  EXPECT_EQ(tokenizer.encode("<x>"), (Ids{256}));
  EXPECT_EQ(tokenizer.encode("-<x> "), (Ids{'-', 256, ' '}));
  const Ids letters{'<', 'x', '>'};
  EXPECT_EQ(tokenizer.encode("<x>a"), (Ids{'<', 'x', '>', 'a'}));
  EXPECT_EQ(tokenizer.encode("_<x>"), (Ids{'_', '<', 'x', '>'}));
  EXPECT_EQ(tokenizer.encode("\u0301<x>").size(), 5u);  // a mark belongs to a word
  EXPECT_EQ(tokenizer.encode("\u00b2<x>").size(), 3u);  // a superscript does not
}

TEST(AddedTokens, ThatAreNormalizedAreFoundInNormalizedText) {
  json file = byte_tokenizer();
  file["normalizer"] = {{"type", "Lowercase"}};
  file["added_tokens"] = {added_token("Ab", 256), added_token("Cd", 257)};
  file["added_tokens"][0]["normalized"] = true;
  const Tokenizer tokenizer = load(file);
  EXPECT_EQ(tokenizer.encode("AB"), (Ids{256}));
  EXPECT_EQ(tokenizer.encode("ab"), (Ids{256}));
  EXPECT_EQ(tokenizer.encode("CdcD"), (Ids{257, 'c', 'd'}));
}

TEST(AddedTokens, InWhiteSpaceThatIsSwallowedAreKeptUnlessTheySwallowThemselves) {
  json file = byte_tokenizer();
  file["added_tokens"] = {added_token("<x>", 256), added_token("\n", 257), added_token("\t", 258)};
  file["added_tokens"][0]["rstrip"] = true;
  file["added_tokens"][2]["rstrip"] = file["added_tokens"][2]["lstrip"] = true;
  const Tokenizer tokenizer = load(file);
  EXPECT_EQ(tokenizer.encode("<x> \na"), (Ids{256, 257, 'a'}));
  EXPECT_EQ(tokenizer.encode("<x> \ta"), (Ids{256, 'a'}));
}

// Looking through the white space again for each token would take hours.
TEST(AddedTokens, AMegabyteOfThemInWhiteSpaceIsQuick) {
  json file = byte_tokenizer();
  file["added_tokens"] = {added_token("\n", 256), added_token("\t", 257), added_token("\r", 258)};
  file["added_tokens"][1]["rstrip"] = true;
  file["added_tokens"][2]["lstrip"] = true;
  std::string text;
  while (text.size() < 1 << 20) text += "\n\t ";
  const Tokenizer tokenizer = load(file);
  EXPECT_EQ(tokenizer.encode(text).size(), text.size() / 3 * 2);
  EXPECT_EQ(tokenizer.encode(std::string(1 << 20, '\r')).size(), size_t{1} << 20);
}

TEST(AddedTokens, AreRecognizedInThePartsThatAllowThem) {
  json file = byte_tokenizer({{"a", "b"}});
  file["added_tokens"] = {added_token("<s>", 257), added_token("<t>", 258), added_token("<n>", 259)};
  file["added_tokens"][1]["special"] = false;
  file["added_tokens"][2]["normalized"] = true;
  const Tokenizer tokenizer = load(file);
  const auto encoded = [&](const std::vector<TextPart>& parts) { return tokenizer.encode(parts); };
  using enum AddedTokens;
  EXPECT_EQ(encoded({{"<s><t><n>", kAll}}), (Ids{257, 258, 259}));
  EXPECT_EQ(encoded({{"<s><t>", kNotSpecial}}), (Ids{'<', 's', '>', 258}));
  EXPECT_EQ(encoded({{"<s>", kAll}, {"<s><t><n>", kNone}, {"<n>", kAll}}),
            (Ids{257, '<', 's', '>', '<', 't', '>', '<', 'n', '>', 259}));
  // A token across a border is text, and text is one whatever its parts.
  EXPECT_EQ(encoded({{"<s", kAll}, {">", kAll}}), (Ids{'<', 's', '>'}));
  EXPECT_EQ(encoded({{"a", kNone}, {"b", kNotSpecial}, {"", kAll}, {"a", kNone}}), (Ids{256, 'a'}));
  EXPECT_EQ(encoded({}), Ids{});
  EXPECT_THROW(encoded({{"a", kNone}, {"\xff", kNone}}), c10::Error);
  EXPECT_EQ(tokenizer.added_token("<t>"), 258);
  EXPECT_EQ(tokenizer.added_token("a"), std::nullopt);
}

TEST(AddedTokens, SwallowWhiteSpaceOfTheNextPart) {
  json file = byte_tokenizer();
  file["added_tokens"] = {added_token("<x>", 256)};
  file["added_tokens"][0]["rstrip"] = file["added_tokens"][0]["lstrip"] = true;
  const std::vector<TextPart> parts{{"a ", AddedTokens::kNone}, {"<x>"}, {" \nb", AddedTokens::kNone}};
  EXPECT_EQ(load(file).encode(parts), (Ids{'a', 256, 'b'}));
}

TEST(AddedTokens, OnlyTheFirstPartStartsTheText) {
  json file = byte_tokenizer();
  file["pre_tokenizer"] = {{"type", "Metaspace"}, {"replacement", "_"}, {"prepend_scheme", "first"}, {"split", false}};
  file["added_tokens"] = {added_token("<x>", 256)};
  const Tokenizer tokenizer = load(file);
  const std::vector<TextPart> parts{{"a", AddedTokens::kNone}, {"<x>"}, {"b", AddedTokens::kNone}};
  EXPECT_EQ(tokenizer.encode(parts), tokenizer.encode("a<x>b"));
  EXPECT_EQ(tokenizer.encode(parts), (Ids{'_', 'a', 256, 'b'}));
}

}  // namespace
}  // namespace baseq
