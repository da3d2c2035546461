#include "baseq/tokenizer/tokenizer.h"

#include <gtest/gtest.h>

#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tiny_tokenizer.h"

namespace baseq {
namespace {

using test::added_token;
using test::byte_tokenizer;
using test::error_of;
using test::golden_path;
using test::Ids;
using test::json;
using test::load;
using test::random_text;
using test::read_json;

// Merges one pair at a time, the leftmost of lowest rank, looking at all pairs every time.
std::vector<std::string> slow_bpe(std::vector<std::string> symbols,
                                  const std::map<std::pair<std::string, std::string>, size_t>& ranks) {
  while (true) {
    size_t best_rank = ranks.size(), best = 0;
    for (size_t i = 0; i + 1 < symbols.size(); ++i) {
      const auto found = ranks.find({symbols[i], symbols[i + 1]});
      if (found != ranks.end() && found->second < best_rank) best_rank = found->second, best = i;
    }
    if (best_rank == ranks.size()) return symbols;
    symbols[best] += symbols[best + 1];
    symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(best) + 1);
  }
}

void expect_goldens(const Tokenizer& tokenizer, const char* ids_key) {
  const json goldens = read_json(golden_path("goldens.json"));
  EXPECT_GE(goldens["cases"].size(), 300u);
  for (const json& golden : goldens["cases"]) {
    EXPECT_EQ(tokenizer.encode(golden["text"].get<std::string>()), golden[ids_key].get<Ids>())
        << golden["text"].dump(-1, ' ', true) << "; if the package changed, re-run scripts/make_tokenizer_goldens.py";
  }
}

TEST(Tokenizer, IdsEqualThoseOfTheTokenizersPackage) {
  const Tokenizer tokenizer(golden_path("tokenizer.json"));
  EXPECT_EQ(tokenizer.vocab_size(), read_json(golden_path("goldens.json"))["vocab_size"].get<int64_t>());
  expect_goldens(tokenizer, "ids");
}

TEST(Tokenizer, IdsEqualThoseOfTheTokenizersPackageWithoutDigits) {
  json file = read_json(golden_path("tokenizer.json"));
  file["pre_tokenizer"] = json(file["pre_tokenizer"]["pretokenizers"][1]);
  expect_goldens(load(file), "ids_without_digits");
}

TEST(Tokenizer, MergesMayBeStringsAndAByteLevelPostProcessorAddsNothing) {
  json file = read_json(golden_path("tokenizer.json"));
  for (json& merge : file["model"]["merges"]) merge = merge[0].get<std::string>() + " " + merge[1].get<std::string>();
  file["post_processor"] = file["decoder"];
  expect_goldens(load(file), "ids");
}

TEST(Tokenizer, DecodedTextEqualsThatOfTheTokenizersPackage) {
  const Tokenizer tokenizer(golden_path("tokenizer.json"));
  const json goldens = read_json(golden_path("goldens.json"));
  for (const json& golden : goldens["cases"]) {
    EXPECT_EQ(tokenizer.decode(golden["ids"].get<Ids>()), golden["decoded"].get<std::string>());
  }
}

TEST(Tokenizer, DecodeInvertsEncodeOnRandomText) {
  json file = byte_tokenizer({{"a", "b"}, {"Ġ", "a"}, {"ab", "ab"}, {"Ã", "©"}, {"Ġ", "Ġ"}});
  file["added_tokens"].push_back(added_token("<|end|>", 261));
  const Tokenizer tokenizer = load(file);
  std::mt19937 random(1);
  for (int i = 0; i < 500; ++i) {
    std::string text = random_text(random, random() % 60);
    if (i % 5 == 0) text += "<|end|>abababé    ";
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
  }
}

TEST(Tokenizer, EveryPieceOfTheTextIsItsOwnWord) {
  // A merge that does not happen shows where a word begins.
  const Tokenizer tokenizer = load(byte_tokenizer({{"a", "a"}, {"Ġ", "a"}, {"1", "1"}, {"'", "s"}, {"Ġ", "Ġ"}}));
  EXPECT_EQ(tokenizer.encode("aa"), (Ids{256}));
  EXPECT_EQ(tokenizer.encode("a\u0301a"), (Ids{'a', 0xCC, 0x81, 'a'}));
  EXPECT_EQ(tokenizer.encode("11"), (Ids{'1', '1'}));
  EXPECT_EQ(tokenizer.encode("  a"), (Ids{' ', 257}));
  EXPECT_EQ(tokenizer.encode("  1"), (Ids{260, '1'}));
  EXPECT_EQ(tokenizer.encode("a's's"), (Ids{'a', 259, 259}));
  EXPECT_EQ(tokenizer.encode(""), Ids{});
}

TEST(Tokenizer, AByteWithoutATokenIsDropped) {
  json file = byte_tokenizer({{"a", "c"}});
  file["model"]["vocab"].erase("b");
  const Tokenizer tokenizer = load(file);
  EXPECT_EQ(tokenizer.encode("abc"), (Ids{256}));
  EXPECT_EQ(tokenizer.encode("bb"), Ids{});
}

TEST(Tokenizer, WhatHasNoTokenFallsBackToBytesThenToTheUnknownToken) {
  json file = byte_tokenizer();
  file["pre_tokenizer"] = nullptr;
  file["decoder"] = {{"type", "Fuse"}};
  auto& model = file["model"];
  model["vocab"] = {{"a", 0}, {"b", 1}, {"ab", 2}, {"<unk>", 3}, {"<0xC3>", 4}, {"<0xA9>", 5}};
  model["merges"] = json::array({json::array({"a", "b"})});
  EXPECT_EQ(load(file).encode("ab\u00e9xya"), (Ids{2, 0}));
  model["unk_token"] = "<unk>";
  EXPECT_EQ(load(file).encode("ab\u00e9xya"), (Ids{2, 3, 3, 3, 0}));
  model["fuse_unk"] = true;
  EXPECT_EQ(load(file).encode("ab\u00e9xya"), (Ids{2, 3, 0}));
  model["byte_fallback"] = true;
  EXPECT_EQ(load(file).encode("ab\u00e9xya"), (Ids{2, 4, 5, 3, 0}));
  // As in the package the unknown token waits for a character that has a token itself.
  EXPECT_EQ(load(file).encode("x\u00e9ya"), (Ids{4, 5, 3, 0}));
  model["unk_token"] = "<nope>";
  EXPECT_EQ(load(file).encode("ab"), (Ids{2}));
  const std::string message = error_of([&] { load(file).encode("x"); });
  EXPECT_NE(message.find("model.unk_token '<nope>'"), std::string::npos) << message;
}

TEST(Tokenizer, IgnoreMergesTakesAWholePieceThatIsAToken) {
  json file = byte_tokenizer({{"a", "b"}, {"b", "c"}});
  file["model"]["vocab"]["abc"] = 258;
  file["model"]["vocab"]["Ġé"] = 259;  // characters of the byte-level alphabet: a space and the byte 0xE9
  EXPECT_EQ(load(file).encode("abc abcd"), (Ids{256, 'c', ' ', 256, 'c', 'd'}));
  file["model"]["ignore_merges"] = true;
  EXPECT_EQ(load(file).encode("abc abcd"), (Ids{258, ' ', 256, 'c', 'd'}));
  EXPECT_EQ(load(file).encode(" \u00e9"), (Ids{' ', 0xC3, 0xA9}));
}

TEST(Tokenizer, TheTemplatesTokensStandAroundTheTextOnRequest) {
  json file = byte_tokenizer();
  file["post_processor"] = {{"type", "TemplateProcessing"},
                            {"single",
                             {{{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}},
                              {{"Sequence", {{"id", "A"}, {"type_id", 0}}}},
                              {{"SpecialToken", {{"id", "</s>"}, {"type_id", 0}}}}}},
                            {"pair", json::array()},
                            {"special_tokens",
                             {{"<s>", {{"id", "<s>"}, {"ids", {256, 257}}, {"tokens", {"<s>", "<s>"}}}},
                              {"</s>", {{"id", "</s>"}, {"ids", {258}}, {"tokens", {"</s>"}}}}}}};
  for (int32_t id = 256; id < 259; ++id) {
    file["added_tokens"].push_back(added_token("<" + std::to_string(id) + ">", id));
  }
  const Tokenizer tokenizer = load(file);
  EXPECT_EQ(tokenizer.encode("a"), (Ids{256, 257, 'a', 258}));
  EXPECT_EQ(tokenizer.encode(""), (Ids{256, 257, 258}));
  EXPECT_EQ(tokenizer.encode("a", /*add_special_tokens=*/false), (Ids{'a'}));
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("a")), "<256><257>a<258>");
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("a"), /*skip_special_tokens=*/true), "a");
}

TEST(Tokenizer, MergesLongWordsLikeTheSlowReference) {
  const json file = read_json(golden_path("tokenizer.json"));
  std::map<std::pair<std::string, std::string>, size_t> ranks;
  for (const json& merge : file["model"]["merges"]) ranks.emplace(std::pair(merge[0], merge[1]), ranks.size());
  const Tokenizer tokenizer(golden_path("tokenizer.json"));
  const std::string letters = "etaoinshrdlu";  // ASCII letters stand for themselves in the byte-level alphabet
  std::mt19937 random(2);
  for (const size_t length : {2, 3, 10, 100, 2000}) {
    std::string word;
    std::vector<std::string> symbols;
    for (size_t i = 0; i < length; ++i) {
      symbols.emplace_back(1, letters[random() % letters.size()]);
      word += symbols.back();
    }
    Ids expected;
    for (const std::string& token : slow_bpe(symbols, ranks)) expected.push_back(file["model"]["vocab"][token]);
    EXPECT_EQ(tokenizer.encode(word), expected);
  }
}

// Quadratic merging would take hours here.
TEST(Tokenizer, AMegabyteWithoutSpacesIsOneWord) {
  const Tokenizer tokenizer = load(byte_tokenizer({{"a", "b"}, {"ab", "ab"}, {"c", "c"}, {"b", "c"}, {"abab", "cc"}}));
  const std::string unit = "ababccbc";  // abab+cc | bc, wherever it stands
  const Ids unit_ids = tokenizer.encode(unit);
  EXPECT_EQ(unit_ids, (Ids{260, 259}));
  std::string text;
  Ids expected;
  while (text.size() < 1 << 20) {
    text += unit;
    expected.insert(expected.end(), unit_ids.begin(), unit_ids.end());
  }
  EXPECT_EQ(tokenizer.encode(text), expected);
}

TEST(Tokenizer, ThreadsMayShareOneTokenizer) {
  const Tokenizer tokenizer(golden_path("tokenizer.json"));
  std::mt19937 random(3);
  std::vector<std::string> texts;
  std::vector<Ids> expected;
  for (int i = 0; i < 20; ++i) {
    texts.push_back(random_text(random, 500));
    expected.push_back(tokenizer.encode(texts.back()));
  }
  std::vector<int> num_equal(4, 0);
  std::vector<std::thread> threads;
  for (int& count : num_equal) {
    threads.emplace_back([&] {
      for (size_t i = 0; i < texts.size(); ++i) count += tokenizer.encode(texts[i]) == expected[i];
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(num_equal, std::vector<int>(4, 20));
}

TEST(Tokenizer, InvalidUtf8IsRefusedWithItsOffset) {
  const Tokenizer tokenizer = load(byte_tokenizer());
  const std::vector<std::pair<std::string, size_t>> cases = {
      {"\x80", 0},
      {"abc\xC3", 3},
      {"abc\xC3(", 3},
      {"0123456789012345\xFF", 16},
      {"\xC3\xA9\xC0\x80", 2},              // overlong
      {"\xE0\x80\x80", 0},                  // overlong
      {"12\xED\xA0\x80", 2},                // a surrogate
      {"\xF4\x90\x80\x80", 0},              // beyond U+10FFFF
      {"\xF0\x9F\x98\x80\xF0\x9F\x98", 4},  // cut
  };
  for (const auto& [text, offset] : cases) {
    const std::string message = error_of([&] { tokenizer.encode(text); });
    EXPECT_TRUE(message.ends_with("not valid UTF-8 at byte " + std::to_string(offset))) << message;
  }
}

TEST(Tokenizer, DecodeRefusesIdsWithoutAToken) {
  const Tokenizer tokenizer = load(byte_tokenizer());
  for (const int32_t id : {-1, 256, 1 << 30}) {
    const std::string message = error_of([&] { tokenizer.decode(Ids{'a', id}); });
    EXPECT_NE(message.find("id " + std::to_string(id) + " at position 1"), std::string::npos) << message;
  }
}

}  // namespace
}  // namespace baseq
