#include <gtest/gtest.h>

#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "baseq/tokenizer/tokenizer.h"
#include "tiny_tokenizer.h"

namespace baseq {
namespace {

using test::added_token;
using test::byte_tokenizer;
using test::error_of;
using test::json;
using test::load;
using test::load_text;

TEST(TokenizerJson, AllThatIsUnsupportedIsNamedAtOnce) {
  json file = byte_tokenizer();
  file["truncation"] = {{"max_length", 5}};
  file["normalizer"] = {{"type", "Sequence"},
                        {"normalizers", {{{"type", "NFC"}, {"form", 1}}, {{"type", "StripAccents"}}}}};
  auto& steps = file["pre_tokenizer"]["pretokenizers"];
  steps.insert(steps.begin(), json::object({{"type", "BertPreTokenizer"}}));
  file["post_processor"] = {{"type", "RobertaProcessing"}};
  file["decoder"] = {{"type", "WordPiece"}};
  file["model"]["dropout"] = 0.1;
  file["model"]["new_option"] = 1;
  file["added_tokens"].push_back(added_token("<x>", 256));
  file["added_tokens"][0]["flag"] = true;
  const std::string message = error_of([&] { load(file); });
  for (const char* name :
       {"truncation", "normalizer.normalizers[0].form = 1", "normalizer.normalizers[1] StripAccents",
        "pre_tokenizer.pretokenizers[0] BertPreTokenizer", "post_processor RobertaProcessing", "decoder WordPiece",
        "model.dropout = 0.1", "model.new_option = 1", "added_tokens[0].flag = true", "_tokenizer.json"}) {
    EXPECT_NE(message.find(name), std::string::npos) << name << " in " << message;
  }
}

json split(const std::string& regex) {
  return {{"type", "Split"}, {"pattern", {{"Regex", regex}}}, {"behavior", "Isolated"}, {"invert", false}};
}

TEST(TokenizerJson, UnsupportedOptionsAreRefusedByName) {
  const auto template_of = [](const json& single) -> json {
    return {{"type", "TemplateProcessing"},
            {"single", single},
            {"pair", json::array()},
            {"special_tokens", {{"<s>", {{"id", "<s>"}, {"ids", {1}}, {"tokens", {"<s>"}}}}}}};
  };
  const json text = {{"Sequence", {{"id", "A"}, {"type_id", 0}}}};
  const json second = {{"Sequence", {{"id", "B"}, {"type_id", 0}}}};
  const std::vector<std::pair<std::function<void(json&)>, std::string>> cases = {
      {[](json& f) {
         f["model"] = {{"type", "Unigram"}};
       },
       "model Unigram"},
      {[](json& f) { f["model"]["continuing_subword_prefix"] = "##"; }, "model.continuing_subword_prefix"},
      {[](json& f) { f["model"]["end_of_word_suffix"] = "</w>"; }, "model.end_of_word_suffix"},
      {[](json& f) {
         f["padding"] = {{"pad_id", 0}};
       },
       "padding"},
      {[](json& f) { f["version"] = "2.0"; }, "version"},
      {[](json& f) { std::swap(f["pre_tokenizer"]["pretokenizers"][0], f["pre_tokenizer"]["pretokenizers"][1]); },
       "pre_tokenizer.pretokenizers[1] Digits after ByteLevel"},
      {[](json& f) { f["pre_tokenizer"] = split("\\w+"); },
       "pre_tokenizer.pattern: regular expression '\\w+': an escape"},
      {[](json& f) {
         f["normalizer"] = {{"type", "Replace"}, {"pattern", {{"String", ""}}}, {"content", "x"}};
       },
       "normalizer.pattern.String = \"\""},
      {[](json& f) {
         f["normalizer"] = {{"type", "Prepend"}, {"prepend", ""}};
       },
       "normalizer.prepend = \"\""},
      {[&](json& f) {
         f["post_processor"] = template_of(json::array({text, second}));
       },
       "post_processor.single[1].Sequence"},
      {[&](json& f) {
         f["post_processor"] = template_of(json::array({text, text}));
       },
       "post_processor.single = "},
      {[&](json& f) { f["post_processor"] = template_of(json::array()); }, "post_processor.single = []"},
      {[&](json& f) {
         const json one = template_of(json::array({text}));
         f["post_processor"] = {{"type", "Sequence"}, {"processors", json::array({one, one})}};
       },
       "post_processor.processors[1] TemplateProcessing"},
  };
  for (const auto& [change, name] : cases) {
    json file = byte_tokenizer();
    change(file);
    const std::string message = error_of([&] { load(file); });
    EXPECT_NE(message.find("not supported: "), std::string::npos) << message;
    EXPECT_NE(message.find(name), std::string::npos) << name << " in " << message;
  }
}

// Oniguruma, which the package uses, and PCRE2 differ here, or the construct is not read.
TEST(TokenizerJson, RegularExpressionsThatAreNotReadAreRefused) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"a|\\b", "an escape at '\\b'"},
      {"\\p{Han}+", "a property other than a general category"},
      {"\\p{L", "a property other than a general category"},
      {"^a", "an anchor"},
      {"a$", "an anchor"},
      {"[a[b]]", "a class within a class"},
      {"[a-z&&[^b]]", "a class within a class"},
      {"[a", "a class that is not closed"},
      {"[]a]", "a class that starts with a bracket"},
      {"[z-a]", "an empty range"},
      {"[\\s-a]", "a range from a set"},
      {"(a", "a group that is not closed"},
      {"a)", "a parenthesis that closes no group"},
      {"(?<name>a)", "a group"},
      {"(?i)a", "a group"},
      {"(?i:ss)", "a pair of letters that is the case folding of one character"},
      {"(?i:[a-z])", "a class without regard to case"},
      {"(?i:\u00e9)", "a character other than ASCII without regard to case"},
      {"a{2}+", "an interval with a suffix"},
      {"a{2}?", "an interval with a suffix"},
      {"a{b}", "a brace that is no interval"},
      {"(a)\\1", "an escape"},
      {"a\\", "a backslash at the end"},
      {"\\xe9", "a byte"},
      {"a*", "may match the empty text"},
      {"a|", "may match the empty text"},
      {"+", "is not valid"},
  };
  for (const auto& [regex, reason] : cases) {
    json file = byte_tokenizer();
    file["pre_tokenizer"] = split(regex);
    const std::string message = error_of([&] { load(file); });
    EXPECT_NE(message.find("pre_tokenizer.pattern: regular expression '" + regex + "'"), std::string::npos) << message;
    EXPECT_NE(message.find(reason), std::string::npos) << reason << " in " << message;
  }
}

TEST(TokenizerJson, MalformedFilesAreRefused) {
  const std::vector<std::pair<std::function<void(json&)>, std::string>> cases = {
      {[](json& f) { f = json::array(); }, "the file is array, expected an object"},
      {[](json& f) { f.erase("version"); }, "version is missing"},
      {[](json& f) { f.erase("model"); }, "model is missing"},
      {[](json& f) { f["model"] = 3; }, "model is number, expected an object"},
      {[](json& f) { f["model"].erase("type"); }, "model.type is missing"},
      {[](json& f) { f["model"].erase("vocab"); }, "model.vocab is missing"},
      {[](json& f) { f["model"]["vocab"] = json::array(); }, "model.vocab is array"},
      {[](json& f) { f["model"]["vocab"]["a"] = "x"; }, "model.vocab.a is \"x\", expected a token id"},
      {[](json& f) { f["model"]["vocab"]["a"] = -1; }, "model.vocab.a is -1"},
      {[](json& f) { f["model"]["vocab"]["a"] = 1.5; }, "model.vocab.a is 1.5"},
      {[](json& f) { f["model"]["vocab"]["a"] = int64_t{1} << 40; }, "model.vocab.a is 1099511627776"},
      {[](json& f) { f["model"]["vocab"]["a"] = 98; }, "the id 98 twice"},
      {[](json& f) { f["model"].erase("merges"); }, "model.merges is missing"},
      {[](json& f) { f["model"]["merges"] = "a b"; }, "model.merges is string"},
      {[](json& f) { f["model"]["merges"] = {"ab"}; }, "model.merges[0] is 'ab'"},
      {[](json& f) { f["model"]["merges"] = {"a b c"}; }, "model.merges[0] is 'a b c'"},
      {[](json& f) {
         f["model"]["merges"] = json::array({{"a", 1, "b"}});
       },
       "model.merges[0] is "},
      {[](json& f) {
         f["model"]["merges"] = json::array({json::array({"a", "nope"})});
       },
       "needs the token 'nope'"},
      {[](json& f) {
         f["model"]["merges"] = json::array({json::array({"a", "b"})});
       },
       "needs the token 'ab'"},
      {[](json& f) { f["decoder"] = 1; }, "decoder is number, expected an object"},
      {[](json& f) { f["normalizer"] = json::object(); }, "normalizer.type is missing"},
      {[](json& f) {
         f["decoder"] = {{"type", "Strip"}, {"content", "ab"}, {"start", 1}, {"stop", 0}};
       },
       "decoder.content is 'ab', expected one character"},
      {[](json& f) {
         f["decoder"] = {{"type", "Strip"}, {"content", "a"}, {"start", -1}, {"stop", 0}};
       },
       "decoder.start is -1, expected an integer from 0"},
      {[](json& f) {
         f["pre_tokenizer"] = split("a");
         f["pre_tokenizer"]["behavior"] = "isolated";
       },
       "pre_tokenizer.behavior is 'isolated', expected one of Removed"},
      {[](json& f) {
         f["pre_tokenizer"] = {{"type", "Metaspace"}, {"replacement", "_"}, {"add_prefix_space", false}};
       },
       "pre_tokenizer.add_prefix_space is false"},
      {[](json& f) {
         f["post_processor"] = {{"type", "TemplateProcessing"},
                                {"single", {{{"SpecialToken", {{"id", "<s>"}}}}}},
                                {"special_tokens", json::object()}};
       },
       "post_processor.special_tokens.<s> is missing"},
      {[](json& f) {
         f["normalizer"] = {{"type", "Strip"}, {"strip_left", true}, {"strip_right", true}};
         f["added_tokens"] = {added_token(" ", 256)};
         f["added_tokens"][0]["normalized"] = true;
       },
       "nothing is left of the added token ' '"},
      {[](json& f) { f["pre_tokenizer"].erase("pretokenizers"); }, "pre_tokenizer.pretokenizers is missing"},
      {[](json& f) { f["pre_tokenizer"]["pretokenizers"][1].erase("add_prefix_space"); },
       "add_prefix_space is missing"},
      {[](json& f) { f["added_tokens"] = 1; }, "added_tokens is number, expected an array"},
      {[](json& f) { f["added_tokens"] = {1}; }, "added_tokens[0] is number, expected an object"},
      {[](json& f) { f["added_tokens"] = {added_token("", 256)}; }, "the added token 256 has no content"},
      {[](json& f) { f["added_tokens"] = {added_token("<x>", 300)}; }, "expected 256, the next free id"},
      {[](json& f) { f["added_tokens"] = {added_token("a", 256)}; }, "expected 97 as in model.vocab"},
      {[](json& f) {
         f["added_tokens"] = {added_token("<x>", 256), added_token("<x>", 257)};
       },
       "'<x>' is there twice"},
  };
  for (const auto& [change, expected] : cases) {
    json file = byte_tokenizer();
    change(file);
    const std::string message = error_of([&] { load(file); });
    EXPECT_NE(message.find(expected), std::string::npos) << expected << " in " << message;
    EXPECT_TRUE(message.starts_with("tokenizer: ")) << message;
  }
}

// `depth` brackets around nothing, as a member of a file that is otherwise whole.
std::string nested(size_t depth, char open, char close) {
  std::string file = byte_tokenizer().dump();
  file.pop_back();
  return file + ",\"x\":" + std::string(depth, open) + std::string(depth, close) + "}";
}

TEST(TokenizerJson, NestingIsRefusedBeforeItReachesTheStack) {
  EXPECT_NE(error_of([] { load_text(nested(100'000, '[', ']')); }).find("nests deeper than 64 levels"),
            std::string::npos);
  // What is not that deep is a key that is not supported, named in short.
  EXPECT_NE(error_of([] { load_text(nested(60, '[', ']')); }).find("not supported: x = [[["), std::string::npos);
}

TEST(TokenizerJson, StepsAreLimitedInAllSequencesIncluded) {
  const auto lowercase = [](int count) -> json {
    json steps = json::array();
    for (int i = 0; i < count; ++i) steps.push_back({{"type", "Lowercase"}});
    return {{"type", "Sequence"}, {"normalizers", steps}};
  };
  json file = byte_tokenizer();  // three steps before and one behind: Sequence, Digits, ByteLevel; ByteLevel
  file["normalizer"] = lowercase(59);
  EXPECT_EQ(load(file).encode("A"), test::Ids{'a'});
  file["normalizer"] = lowercase(60);
  EXPECT_NE(error_of([&] { load(file); }).find("decoder is step 65 of the file, Sequences included; at most 64"),
            std::string::npos);
  json empty = json::array();
  for (int i = 0; i < 100'000; ++i) empty.push_back({{"type", "Sequence"}, {"normalizers", json::array()}});
  file["normalizer"] = {{"type", "Sequence"}, {"normalizers", empty}};
  EXPECT_NE(error_of([&] { load(file); }).find("normalizer.normalizers[63] is step 65"), std::string::npos);
}

TEST(TokenizerJson, ExpressionsAreLimitedInAll) {
  json file = byte_tokenizer();
  json steps = json::array();
  for (int i = 0; i < 5; ++i) steps.push_back(split(std::string(1000, 'a')));
  file["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", steps}};
  const std::string message = error_of([&] { load(file); });
  EXPECT_NE(message.find("pretokenizers[4].pattern: the regular expressions of the file have 5000 bytes"),
            std::string::npos)
      << message;
  EXPECT_LT(message.size(), 1000U);
}

TEST(TokenizerJson, ATemplateCannotAddMoreIdsThanTheFileHasBytes) {
  json file = byte_tokenizer();
  json single = json::array();
  for (int i = 0; i < 1000; ++i) single.push_back({{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}});
  single.push_back({{"Sequence", {{"id", "A"}, {"type_id", 0}}}});
  file["post_processor"] = {{"type", "TemplateProcessing"},
                            {"single", single},
                            {"special_tokens", {{"<s>", {{"ids", json(std::vector<int>(1000, 1))}}}}}};
  EXPECT_NE(error_of([&] { load(file); }).find("the template adds 2000 ids"), std::string::npos);
}

TEST(TokenizerJson, ValuesAreNotAllowedManyTimesTheMemoryOfTheirText) {
  std::string text = "{\"version\":[{}";
  for (int i = 0; i < 3'000'000; ++i) text += ",{}";  // 9 MB of text, 300 of values
  EXPECT_NE(error_of([&] { load_text(text + "]}"); }).find("takes more than 224 MiB"), std::string::npos);
}

TEST(TokenizerJson, LongNamesDoNotMakeLongMessages) {
  json file = byte_tokenizer();
  for (int i = 0; i < 100; ++i) file[std::to_string(i) + std::string(100'000, 'x')] = std::string(100'000, 'y');
  const std::string message = error_of([&] { load(file); });
  EXPECT_NE(message.find("and 80 more"), std::string::npos);
  EXPECT_LT(message.size(), 20'000U);
  file = byte_tokenizer();
  file["added_tokens"] = {added_token(std::string(1025, 'x'), 256)};
  EXPECT_NE(error_of([&] { load(file); }).find("the added token 256 has 1025 bytes, expected at most 1024"),
            std::string::npos);
}

TEST(TokenizerJson, AGitLfsPointerIsNamed) {
  const std::string message =
      error_of([] { load_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 17210200\n"); });
  EXPECT_NE(message.find("git lfs pull"), std::string::npos) << message;
}

TEST(TokenizerJson, FilesThatAreNoJsonAreRefused) {
  EXPECT_NE(error_of([] { Tokenizer("/nonexistent/tokenizer.json"); }).find("cannot open"), std::string::npos);
  const std::string whole = byte_tokenizer().dump();
  for (const std::string& text : {std::string(), whole.substr(0, whole.size() / 2), whole + "}", "\xFF" + whole}) {
    EXPECT_NE(error_of([&] { load_text(text); }).find("not valid JSON"), std::string::npos);
  }
}

}  // namespace
}  // namespace baseq
