#include "tokenizer_json.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>
#include <unordered_set>
#include <utility>

#include "../io/strict_json.h"
#include "tokenizer_json_steps.h"

namespace baseq {
namespace {

using nlohmann::json;

constexpr size_t kMaxMergeShown = 60;
// Every position of a text is compared with added tokens to their end. Known ones have up to 256 bytes.
constexpr size_t kMaxContentBytes = 1024;

bool absent_or_empty(const json& value) { return value.is_null() || value == ""; }

void read_vocab(const JsonComponent& model, TokenizerJson& result) {
  const JsonComponent vocab = model.object("vocab");
  std::unordered_set<int32_t> ids;
  result.vocab.reserve(vocab.value().size());
  for (const auto& [token, value] : vocab.value().items()) {
    const int32_t id = read_token_id(value, vocab.place_of(token));
    TORCH_CHECK(ids.insert(id).second, "model.vocab has the id ", id, " twice, the second time for '", token, "'");
    result.vocab.emplace(token, id);
  }
}

void read_merges(const JsonComponent& model, TokenizerJson& result) {
  const json& merges = model.array("merges");
  result.merges.reserve(merges.size());
  for (size_t i = 0; i < merges.size(); ++i) {
    const json& merge = merges[i];
    if (merge.is_string()) {
      const auto& text = merge.get_ref<const std::string&>();
      if (text.starts_with("#version")) continue;  // the first line of a merges.txt
      const size_t space = text.find(' ');
      TORCH_CHECK(space != std::string::npos && text.find(' ', space + 1) == std::string::npos, "model.merges[", i,
                  "] is '", text, "', expected two tokens with one space between them");
      result.merges.emplace_back(text.substr(0, space), text.substr(space + 1));
    } else {
      TORCH_CHECK(merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string(),
                  "model.merges[", i, "] is ", short_json(merge, kMaxMergeShown), ", expected two tokens");
      result.merges.emplace_back(merge[0].get<std::string>(), merge[1].get<std::string>());
    }
  }
}

void read_model(const JsonComponent& model, TokenizerJson& result, Unsupported& unsupported) {
  const std::string type = model.string("type");
  if (type != "BPE") return unsupported.add("model " + type);
  unsupported.other_keys(model, {"type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                                 "fuse_unk", "byte_fallback", "ignore_merges", "vocab", "merges"});
  const json& dropout = model.get("dropout");
  unsupported.unless(dropout.is_null() || dropout == 0, model, "dropout");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    unsupported.unless(absent_or_empty(model.get(key)), model, key);
  }
  if (!model.get("unk_token").is_null()) result.model.unk_token = model.string("unk_token");
  const auto flag = [&](const char* key) { return !model.get(key).is_null() && model.boolean(key); };
  result.model.fuse_unk = flag("fuse_unk");
  result.model.byte_fallback = flag("byte_fallback");
  result.model.ignore_merges = flag("ignore_merges");
  read_vocab(model, result);
  read_merges(model, result);
}

void read_added_tokens(const JsonComponent& root, TokenizerJson& result, Unsupported& unsupported) {
  root.for_each_object("added_tokens", [&](const JsonComponent& token) {
    unsupported.other_keys(token, {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"});
    result.added_tokens.push_back({.content = token.string("content"),
                                   .id = read_token_id(token.at("id"), token.place_of("id")),
                                   .single_word = token.boolean("single_word"),
                                   .lstrip = token.boolean("lstrip"),
                                   .rstrip = token.boolean("rstrip"),
                                   .normalized = token.boolean("normalized"),
                                   .special = token.boolean("special")});
  });
}

// `tokenizers` does not believe the ids of added tokens: one that the vocabulary has keeps that id, any other gets the
// next free one. A file that says otherwise is refused.
void check_added_tokens(const TokenizerJson& file) {
  std::unordered_set<std::string> contents;
  int64_t next_free = static_cast<int64_t>(file.vocab.size());
  for (const AddedToken& token : file.added_tokens) {
    TORCH_CHECK(!token.content.empty(), "the added token ", token.id, " has no content");
    TORCH_CHECK(token.content.size() <= kMaxContentBytes, "the added token ", token.id, " has ", token.content.size(),
                " bytes, expected at most ", kMaxContentBytes);
    TORCH_CHECK(contents.insert(token.content).second, "the added token '", token.content, "' is there twice");
    const auto known = file.vocab.find(token.content);
    const int64_t expected = known != file.vocab.end() ? known->second : next_free;
    TORCH_CHECK(token.id == expected, "the added token '", token.content, "' has the id ", token.id, ", expected ",
                expected, known != file.vocab.end() ? " as in model.vocab" : ", the next free id");
    next_free = std::max<int64_t>(next_free, token.id + int64_t{1});
  }
}

TokenizerJson read(const json& root_value) {
  const JsonComponent root(root_value, "");
  TokenizerJson result;
  Unsupported unsupported;
  unsupported.other_keys(root, {"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer",
                                "post_processor", "decoder", "model"});
  unsupported.unless(root.string("version") == "1.0", root, "version");
  for (const char* key : {"truncation", "padding"}) unsupported.unless(root.get(key).is_null(), root, key);
  StepReading steps{unsupported};
  result.normalizer = read_normalizer(root, steps);
  result.pre_tokenizer = read_pre_tokenizer(root, steps);
  result.post_processor = read_post_processor(root, steps);
  result.decoder = read_decoder(root, steps);
  read_model(root.object("model"), result, unsupported);
  result.model.byte_level =
      !result.pre_tokenizer.empty() && std::holds_alternative<pre_tokenizers::ByteLevel>(result.pre_tokenizer.back());
  if (!root.get("added_tokens").is_null()) read_added_tokens(root, result, unsupported);
  unsupported.check();
  check_added_tokens(result);
  return result;
}

}  // namespace

TokenizerJson read_tokenizer_json(const json& value) {
  try {
    return read(value);
  } catch (const json::exception& error) {
    TORCH_CHECK(false, "it is not valid JSON: ", error.what());
  }
}

}  // namespace baseq
