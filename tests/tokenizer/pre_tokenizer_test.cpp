#include <gtest/gtest.h>

#include <map>
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
using Pieces = std::vector<std::string>;

// Checks that `text` falls into `pieces`: each is a token, found by ignore_merges; any other would have no id.
void expect_pieces(const json& pre_tokenizer, const std::string& text, const Pieces& pieces) {
  json file = byte_tokenizer();
  file["pre_tokenizer"] = pre_tokenizer;
  file["decoder"] = nullptr;
  file["model"]["ignore_merges"] = true;
  file["model"]["unk_token"] = "<unk>";
  json vocab = {{"<unk>", 0}};
  Ids expected;
  for (const std::string& piece : pieces) {
    if (!vocab.contains(piece)) vocab[piece] = vocab.size();
    expected.push_back(vocab[piece].get<int32_t>());
  }
  file["model"]["vocab"] = vocab;
  const Tokenizer tokenizer = load(file);
  EXPECT_EQ(tokenizer.encode(text), expected) << text << ": " << tokenizer.decode(tokenizer.encode(text));
}

json split(const json& pattern, const std::string& behavior, bool invert = false) {
  return {{"type", "Split"}, {"pattern", pattern}, {"behavior", behavior}, {"invert", invert}};
}
json regex(const std::string& pattern) { return {{"Regex", pattern}}; }

TEST(PreTokenizer, SplitDoesWithMatchesWhatItsBehaviorSays) {
  const std::string text = "the-final--countdown";
  const json hyphen = {{"String", "-"}};
  expect_pieces(split(hyphen, "Removed"), text, {"the", "final", "countdown"});
  expect_pieces(split(hyphen, "Isolated"), text, {"the", "-", "final", "-", "-", "countdown"});
  expect_pieces(split(hyphen, "MergedWithPrevious"), text, {"the-", "final-", "-", "countdown"});
  expect_pieces(split(hyphen, "MergedWithNext"), text, {"the", "-final", "-", "-countdown"});
  expect_pieces(split(hyphen, "Contiguous"), text, {"the", "-", "final", "--", "countdown"});
  expect_pieces(split(hyphen, "Removed", true), text, {"-", "-", "-"});
  expect_pieces(split(hyphen, "MergedWithPrevious", true), text, {"the", "-final", "-", "-countdown"});
}

TEST(PreTokenizer, DigitsStandAloneOrTogether) {
  expect_pieces({{"type", "Digits"}, {"individual_digits", true}}, "a12\u00bd b", {"a", "1", "2", "\u00bd", " b"});
  expect_pieces({{"type", "Digits"}, {"individual_digits", false}}, "a12\u00bd b", {"a", "12\u00bd", " b"});
}

TEST(PreTokenizer, MetaspacePrependsWhereItsSchemeSays) {
  const auto metaspace = [](const std::string& scheme, bool split_at_replacement) -> json {
    return {{"type", "Metaspace"}, {"replacement", "_"}, {"prepend_scheme", scheme}, {"split", split_at_replacement}};
  };
  expect_pieces(metaspace("always", true), "a  b", {"_a", "_", "_b"});
  expect_pieces(metaspace("always", true), " a_b", {"_a", "_b"});
  expect_pieces(metaspace("never", true), "a b", {"a", "_b"});
  expect_pieces(metaspace("never", false), "a b", {"a_b"});
  const auto after_split = [&](const std::string& scheme) -> json {
    return {{"type", "Sequence"}, {"pretokenizers", {split({{"String", ","}}, "Isolated"), metaspace(scheme, false)}}};
  };
  expect_pieces(after_split("first"), "a,b", {"_a", ",", "b"});
  expect_pieces(after_split("always"), "a,b", {"_a", "_,", "_b"});
}

TEST(PreTokenizer, FirstMeansTheBeginningOfTheOriginalText) {
  json file = test::byte_fallback_tokenizer();
  file["pre_tokenizer"] = {{"type", "Metaspace"}, {"replacement", "_"}, {"prepend_scheme", "first"}};
  file["added_tokens"] = {test::added_token("<x>", 256)};
  const auto text_of = [&](const std::string& text) {
    const Tokenizer tokenizer = load(file);
    return tokenizer.decode(tokenizer.encode(text));
  };
  EXPECT_EQ(text_of("a<x>b"), "_a<x>b");
  EXPECT_EQ(text_of("<x>b"), "<x>b");
  file["normalizer"] = {{"type", "Strip"}, {"strip_left", true}, {"strip_right", false}};
  EXPECT_EQ(text_of("a"), "_a");
  EXPECT_EQ(text_of(" a"), "a");  // what stood there is gone
  file["normalizer"] = {{"type", "Replace"}, {"pattern", {{"String", "ab"}}}, {"content", "c"}};
  EXPECT_EQ(text_of("abd"), "cd");  // c stands for the b
}

TEST(PreTokenizer, ByteLevelMayPutASpaceInFront) {
  const auto byte_level = [](bool add_prefix_space, bool use_regex) -> json {
    return {{"type", "ByteLevel"},
            {"add_prefix_space", add_prefix_space},
            {"trim_offsets", true},
            {"use_regex", use_regex}};
  };
  expect_pieces(byte_level(true, true), "a b", {"Ġa", "Ġb"});
  expect_pieces(byte_level(true, false), "a b", {"ĠaĠb"});
  expect_pieces(byte_level(true, false), " a", {"Ġa"});
  expect_pieces(byte_level(false, false), "\u00e9 a", {"Ã©Ġa"});
}

TEST(PreTokenizer, RegularExpressionsMatchAsOnigurumaDoes) {
  expect_pieces(split(regex("(?i:'s|'re)"), "Isolated"), "a'S'\u017f'ReX", {"a", "'S", "'\u017f", "'Re", "X"});
  expect_pieces(split(regex("(?i:k)"), "Isolated"), "aK\u212ab", {"a", "K", "\u212a", "b"});
  expect_pieces(split(regex("\\s+"), "Isolated"), "a\u180eb\u0085\u3000c", {"a\u180eb", "\u0085\u3000", "c"});
  expect_pieces(split(regex("\\s+(?!\\S)|\\s+"), "Isolated"), "a   b", {"a", "  ", " ", "b"});
  expect_pieces(split(regex("\\p{N}{1,3}"), "Isolated"), "12345\u0663\u0664\u0665",
                {"123", "45\u0663", "\u0664\u0665"});
  expect_pieces(split(regex("\\p{^L}|\\P{Lu}+?"), "Isolated"), "a1B", {"a", "1", "B"});
  expect_pieces(split(regex("[^\\P{L}a-c\\x{e9}]+"), "Removed"), "adB1\u00e9\u00ea", {"a", "1\u00e9"});
  expect_pieces(split(regex("(a|(?<=b)c)(?=d)"), "Isolated"), "adcdbcd", {"a", "dcdb", "c", "d"});
  expect_pieces(split(regex("[\\]\\-\\\\^-]+"), "Isolated"), "a]-^\\b", {"a", "]-^\\", "b"});
  expect_pieces(split(regex("[-a.]{,2}x"), "Isolated"), "..-ax", {"..", "-ax"});
  expect_pieces(split(regex("a++b|."), "Isolated"), "aab\na", {"aab", "\n", "a"});
}

// A search sees 64 characters at first, then four times as many.
TEST(PreTokenizer, MatchesMayBeOfAnyLengthAndAnywhere) {
  const json words = split(regex("[a-z]+|\\s+(?!\\S)|\\s+"), "Isolated");
  for (const int length : {1, 62, 63, 64, 65, 66, 255, 256, 257, 1023, 1024, 1025, 100'000}) {
    SCOPED_TRACE(length);
    const std::string word(length, 'a'), spaces(length, ' '), dots(length, '.');
    expect_pieces(words, word + " " + word, {word, " ", word});
    expect_pieces(words, "b" + spaces + " b" + spaces, {"b", spaces, " ", "b", spaces});
    expect_pieces(split(regex("x+"), "Isolated"), dots + "x" + dots + "xx", {dots, "x", dots, "xx"});
    expect_pieces(split(regex("(?<=aa|b)c"), "Isolated"), dots + "cbc" + word + "aac",
                  {dots + "cb", "c", word + "aa", "c"});
    expect_pieces(split(regex("[a.]+?x|b"), "Removed"), word + dots + "xbc", {"c"});
    if (length > 257) continue;  // each letter looks to the end of its word
    expect_pieces(split(regex("(?=a+c)a"), "Removed"), word + "b" + word + "c", {word + "b", "c"});
    expect_pieces(split(regex("a++\\z|a"), "Removed"), word + "b" + word, {"b"});
  }
}

TEST(PreTokenizer, ExpressionsThatWouldTakeHoursAreRefused) {
  std::string sentences;
  for (int i = 0; i < 1000; ++i) sentences += "the quick brown fox ";
  // The last three look from each letter to the end of the text, though they fail with few steps.
  for (const char* hostile :
       {"(?:[a-z ]+)+[^a-z ]|.", "(?:[a-z ]|[a-z ][a-z ])+[^a-z ]|.", "[a-z ]+[^a-z ]|.", "[a-z](?=[a-z ]++[^a-z ])|.",
        "[a-z](?:[a-m ]|[n-z])++[^a-z ]|.", "[a-z ](?:[a-z]++ ++)*[^a-z ]|."}) {
    SCOPED_TRACE(hostile);
    json file = byte_tokenizer();
    file["pre_tokenizer"] = split(regex(hostile), "Isolated");
    const Tokenizer tokenizer = load(file);
    EXPECT_EQ(tokenizer.encode("a.word!").size(), 7U);
    const std::string message = test::error_of([&] { tokenizer.encode(sentences); });
    EXPECT_NE(message.find("takes too long"), std::string::npos) << message;
    EXPECT_NE(message.find(hostile), std::string::npos) << message;
  }
  // Many short texts do not get more than one long one.
  json file = byte_tokenizer();
  file["pre_tokenizer"] = {
      {"type", "Sequence"},
      {"pretokenizers", {split(regex("\\n"), "Removed"), split(regex("(?:a|aa)+[^a]|[^.]"), "Isolated")}}};
  std::string lines;
  for (int i = 0; i < 1000; ++i) lines += std::string(40, 'a') + "\n";
  EXPECT_NE(test::error_of([&] { load(file).encode(lines); }).find("takes too long"), std::string::npos);
}

TEST(PreTokenizer, NewerCharactersThanTheLibrarysAreKnown) {
  // Assigned in Unicode 16: a letter, a digit, a mark, a symbol.
  expect_pieces(split(regex("\\p{Ll}|\\p{Nd}|\\p{Mn}|\\p{So}"), "Removed"), "a\u1c8a\U00010d40\u0897\U0001cc00\u1c89",
                {"\u1c89"});
}

}  // namespace
}  // namespace baseq
