#include "gguf_tokenizer_json.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <set>

#include "../io/strict_json.h"
#include "../tokenizer/unicode.h"
#include "baseq/io/json_object.h"

namespace baseq {
namespace {

using nlohmann::json;

json split(const std::string& pattern) {
  return {{"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Isolated"}, {"invert", false}};
}

json byte_level(bool use_regex) {
  return {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", use_regex}};
}

json sequence(const json& first, const json& second) {
  return {{"type", "Sequence"}, {"pretokenizers", {first, second}}};
}

const json& required(const GgufFile& file, const char* key) {
  const auto it = file.metadata().find(key);
  TORCH_CHECK(it != file.metadata().end(), file.name(), ": has no ", key,
              "; name a tokenizer.json with --tokenizer, or evaluate --tokens");
  return *it;
}

const json& required_array(const GgufFile& file, const char* key) {
  const json& value = required(file, key);
  TORCH_CHECK(value.is_array(), file.name(), ": ", key, " is no array");
  return value;
}

std::string text_of(const GgufFile& file, const char* key, const json& value) {
  TORCH_CHECK(value.is_string(), file.name(), ": ", key, ": expected strings");
  std::string text = value.get<std::string>();
  TORCH_CHECK(find_invalid_utf8(text) == std::string::npos, file.name(), ": ", key, ": ", quote(text),
              " is not valid UTF-8");
  return text;
}

}  // namespace

const std::map<std::string, json>& gguf_pre_tokenizers() {
  static const std::map<std::string, json> known = {
      {"gpt-2", byte_level(true)},
      {"smollm", sequence({{"type", "Digits"}, {"individual_digits", true}}, byte_level(true))},
      {"llama-bpe", sequence(split(R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|)"
                                   R"( ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)"),
                             byte_level(false))},
      {"qwen2", sequence(split(R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|)"
                               R"( ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)"),
                         byte_level(false))}};
  return known;
}

json gguf_tokenizer_json(const GgufFile& file) {
  const std::string model = text_of(file, "tokenizer.ggml.model", required(file, "tokenizer.ggml.model"));
  const std::string pre = text_of(file, "tokenizer.ggml.pre", required(file, "tokenizer.ggml.pre"));
  const auto& known = gguf_pre_tokenizers();
  std::vector<std::string> names;
  for (const auto& [name, value] : known) names.push_back(name);
  TORCH_CHECK(model == "gpt2" && known.contains(pre), file.name(), ": the tokenizer is ", quote(model), " with ",
              quote(pre), " in front; supported is \"gpt2\" with ", fmt::format("{}", fmt::join(names, ", ")),
              "; name a tokenizer.json with --tokenizer");
  const json& tokens = required_array(file, "tokenizer.ggml.tokens");
  const json& types = required_array(file, "tokenizer.ggml.token_type");
  TORCH_CHECK(!tokens.empty() && tokens.size() == types.size() && tokens.size() <= (size_t{1} << 30), file.name(), ": ",
              tokens.size(), " tokens but ", types.size(), " token types");
  json vocab = json::object(), added = json::array();
  for (size_t id = 0; id < tokens.size(); ++id) {
    const std::string token = text_of(file, "tokenizer.ggml.tokens", tokens[id]);
    TORCH_CHECK(types[id].is_number_integer(), file.name(), ": tokenizer.ggml.token_type: expected integers");
    const auto type = static_cast<GgufTokenType>(types[id].get<int32_t>());
    if (type == GgufTokenType::kUnused) continue;
    TORCH_CHECK(vocab.emplace(token, id).second, file.name(), ": the token ", quote(token), " is there twice");
    if (type == GgufTokenType::kNormal) continue;
    added.push_back({{"id", id},
                     {"content", token},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", type == GgufTokenType::kControl}});
  }
  json post_processor = nullptr;
  JsonObject metadata(file.metadata(), file.name());
  if (metadata.boolean("tokenizer.ggml.add_bos_token", pre == "llama-bpe")) {
    const auto last = static_cast<int64_t>(tokens.size()) - 1;
    const auto id = static_cast<uint64_t>(metadata.integer("tokenizer.ggml.bos_token_id", 0, 0, last));
    const json& bos = tokens.at(id);
    const json special{{"SpecialToken", {{"id", bos}, {"type_id", 0}}}};
    const auto text = [](const char* name, int type) -> json {
      return {{"Sequence", {{"id", name}, {"type_id", type}}}};
    };
    post_processor = {{"type", "TemplateProcessing"},
                      {"single", {special, text("A", 0)}},
                      {"pair", {special, text("A", 0), special, text("B", 1)}},
                      {"special_tokens", {{bos.get<std::string>(), {{"id", bos}, {"ids", {id}}, {"tokens", {bos}}}}}}};
  }
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", added},
          {"normalizer", pre == "qwen2" ? json{{"type", "NFC"}} : json(nullptr)},
          {"pre_tokenizer", known.at(pre)},
          {"post_processor", post_processor},
          {"decoder", byte_level(true)},
          {"model",
           {{"type", "BPE"},
            {"ignore_merges", pre == "llama-bpe"},
            {"vocab", vocab},
            {"merges", required_array(file, "tokenizer.ggml.merges")}}}};
}

}  // namespace baseq
