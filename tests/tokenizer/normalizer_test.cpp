#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "baseq/tokenizer/tokenizer.h"
#include "tiny_tokenizer.h"

namespace baseq {
namespace {

using test::byte_fallback_tokenizer;
using test::json;
using test::load;

std::string normalized(const json& normalizer, const std::string& text) {
  json file = byte_fallback_tokenizer();
  file["normalizer"] = normalizer;
  const Tokenizer tokenizer = load(file);
  return tokenizer.decode(tokenizer.encode(text));
}

json replace(const json& pattern, const std::string& content) {
  return {{"type", "Replace"}, {"pattern", pattern}, {"content", content}};
}

TEST(Normalizer, FormsFollowUnicode) {
  const std::string text = "e\u0301\u00e9\u1e9b\u0323\ufb01\u00bd\uac00\u11a8";
  EXPECT_EQ(normalized({{"type", "NFC"}}, text), "\u00e9\u00e9\u1e9b\u0323\ufb01\u00bd\uac01");
  EXPECT_EQ(normalized({{"type", "NFD"}}, text), "e\u0301e\u0301\u017f\u0323\u0307\ufb01\u00bd\u1100\u1161\u11a8");
  EXPECT_EQ(normalized({{"type", "NFKC"}}, text), "\u00e9\u00e9\u1e69fi1\u20442\uac01");
  EXPECT_EQ(normalized({{"type", "NFKD"}}, text), "e\u0301e\u0301s\u0323\u0307fi1\u20442\u1100\u1161\u11a8");
}

TEST(Normalizer, MarksAreSortedAcrossAnyDistance) {
  // Exchanging neighbours would take hours.
  std::string mixed = "a", above, below;
  for (int i = 0; i < 200000; ++i) {
    mixed += "\u0301\u0323";
    above += "\u0301";
    below += "\u0323";
  }
  EXPECT_EQ(normalized({{"type", "NFD"}}, mixed), "a" + below + above);
}

TEST(Normalizer, CodePointsThatThePackageDoesNotKnowStay) {
  // U+1E030 is of Unicode 15: utf8proc makes U+0430 of it, the package's tables are older.
  EXPECT_EQ(normalized({{"type", "NFKC"}}, "\U0001e030"), "\U0001e030");
  EXPECT_EQ(normalized({{"type", "NFKC"}}, "\u1d2c"), "A");
}

TEST(Normalizer, LowercaseTakesEachCharacterByItself) {
  EXPECT_EQ(normalized({{"type", "Lowercase"}}, "\u0391\u03a3 \u0130\u01c5\u00df\U00010d50"),
            "\u03b1\u03c3 i\u0307\u01c6\u00df\U00010d70");
}

TEST(Normalizer, MarksInFrontAreWholeForTheNextStep) {
  // U+0344 falls apart into two marks of two bytes, before which U+309A of three bytes is sorted.
  const json steps = {{"type", "Sequence"}, {"normalizers", {{{"type", "NFD"}}, {{"type", "Lowercase"}}}}};
  EXPECT_EQ(normalized(steps, "\u0344\u309aX"), "\u309a\u0308\u0301x");
  EXPECT_EQ(normalized(steps, "\u05a7\u0c4d\u05b4X"), "\u0c4d\u05b4\u05a7x");
}

TEST(Normalizer, StripTakesWhiteSpaceFromEachEnd) {
  const auto strip = [](bool left, bool right) -> json {
    return {{"type", "Strip"}, {"strip_left", left}, {"strip_right", right}};
  };
  const std::string text = " \u3000\u0085 \u00e9 \u200b \t";
  EXPECT_EQ(normalized(strip(true, true), text), "\u00e9 \u200b");
  EXPECT_EQ(normalized(strip(true, false), text), "\u00e9 \u200b \t");
  EXPECT_EQ(normalized(strip(false, true), text), " \u3000\u0085 \u00e9 \u200b");
  EXPECT_EQ(normalized(strip(true, true), " \n "), "");
}

TEST(Normalizer, ReplaceTakesATextOrARegularExpression) {
  EXPECT_EQ(normalized(replace({{"String", "aa"}}, "-"), "aaa a.a"), "-a a.a");
  EXPECT_EQ(normalized(replace({{"String", "."}}, "<>"), "a.b"), "a<>b");
  EXPECT_EQ(normalized(replace({{"Regex", " {2,}"}}, " "), "a   b c  "), "a b c ");
  EXPECT_EQ(normalized(replace({{"Regex", "[^\\s\\u00e9-\\u00ef]+(?!\\S)"}}, ""), "ab \u00e9c d\u00ea"),
            " \u00e9 d\u00ea");
}

TEST(Normalizer, PrependComesBeforeEachPartThatIsNotEmpty) {
  const json prepend = {{"type", "Prepend"}, {"prepend", "_"}};
  EXPECT_EQ(normalized(prepend, "ab"), "_ab");
  EXPECT_EQ(normalized(prepend, ""), "");
  json file = byte_fallback_tokenizer();
  file["normalizer"] = {{"type", "Sequence"}, {"normalizers", {prepend, replace({{"String", " "}}, "_")}}};
  file["added_tokens"] = {test::added_token("<x>", 256)};
  const Tokenizer tokenizer = load(file);
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("a b<x> c<x>")), "_a_b<x>__c<x>");
}

TEST(Normalizer, TextsDoNotGrowWithoutEnd) {
  json steps = json::array();
  for (int i = 0; i < 40; ++i) {
    steps.push_back({{"type", "Replace"}, {"pattern", {{"String", "a"}}}, {"content", "aa"}});
  }
  json file = byte_fallback_tokenizer();
  file["normalizer"] = {{"type", "Sequence"}, {"normalizers", steps}};
  const Tokenizer doubles = load(file);
  EXPECT_NE(
      test::error_of([&] { doubles.encode("an apple"); }).find("a text of 8 bytes becomes one of more than 32 times"),
      std::string::npos);
  EXPECT_EQ(doubles.decode(doubles.encode("no such letter")), "no such letter");
  file["normalizer"] = {{"type", "Prepend"}, {"prepend", std::string(1000, 'x')}};
  EXPECT_NE(test::error_of([&] { load(file).encode("a"); }).find("more than 32 times"), std::string::npos);
  // The compatibility form that grows most, and what a known tokenizer makes of spaces.
  file["normalizer"] = {{"type", "NFKD"}};
  EXPECT_EQ(load(file).encode("\ufdfa\ufdfa").size(), 66U);
  file["normalizer"] = {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "\u2581"}};
  EXPECT_EQ(load(file).encode(std::string(1000, ' ')).size(), 3000U);
}

}  // namespace
}  // namespace baseq
