#include "tokenizer_json.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>

namespace baseq {
namespace {

using nlohmann::json;

std::string short_dump(const json& value) {
  std::string text = value.dump();
  if (text.size() > 60) text = text.substr(0, 57) + "...";
  return text;
}

// One JSON object and its place in the file, for messages: "model", "pre_tokenizer.pretokenizers[0]".
class Object {
 public:
  Object(const json& value, std::string place) : value_(value), place_(std::move(place)) {
    TORCH_CHECK(value_.is_object(), place_.empty() ? "the file" : place_, " is ", value_.type_name(),
                ", expected an object");
  }

  std::string place_of(const std::string& key) const { return place_.empty() ? key : place_ + "." + key; }
  const json& at(const std::string& key) const {
    const auto found = value_.find(key);
    TORCH_CHECK(found != value_.end(), place_of(key), " is missing");
    return *found;
  }
  /// An absent key reads as null.
  const json& get(const std::string& key) const {
    static const json null;
    const auto found = value_.find(key);
    return found == value_.end() ? null : *found;
  }
  Object object(const std::string& key) const { return {at(key), place_of(key)}; }
  const json& array(const std::string& key) const {
    const json& value = at(key);
    TORCH_CHECK(value.is_array(), place_of(key), " is ", value.type_name(), ", expected an array");
    return value;
  }
  std::string string(const std::string& key) const {
    const json& value = at(key);
    TORCH_CHECK(value.is_string(), place_of(key), " is ", value.type_name(), ", expected a string");
    return value.get<std::string>();
  }
  bool boolean(const std::string& key) const {
    const json& value = at(key);
    TORCH_CHECK(value.is_boolean(), place_of(key), " is ", value.type_name(), ", expected a boolean");
    return value.get<bool>();
  }
  const json& value() const { return value_; }
  const std::string& place() const { return place_; }

 private:
  const json& value_;
  std::string place_;
};

int32_t token_id(const json& value, const std::string& place) {
  constexpr auto kMax = std::numeric_limits<int32_t>::max();
  TORCH_CHECK(value.is_number_unsigned() && value.get<uint64_t>() <= kMax, place, " is ", short_dump(value),
              ", expected a token id from 0 to ", kMax);
  return value.get<int32_t>();
}

// Collects what this library cannot do exactly, so that one message can name all of it.
class Unsupported {
 public:
  void add(const std::string& what) { items_.push_back(what); }
  void unless(bool supported, const Object& object, const std::string& key) {
    if (!supported) add(object.place_of(key) + " = " + short_dump(object.get(key)));
  }
  void other_keys(const Object& object, const std::set<std::string, std::less<>>& known) {
    for (const auto& [key, value] : object.value().items()) {
      if (!known.contains(key)) unless(false, object, key);
    }
  }
  void check() const {
    if (items_.empty()) return;
    std::string list;
    for (const std::string& item : items_) list += (list.empty() ? "" : ", ") + item;
    TORCH_CHECK(false, "it needs what is not supported: ", list);
  }

 private:
  std::vector<std::string> items_;
};

bool absent_or_empty(const json& value) { return value.is_null() || value == ""; }
bool absent_or_false(const json& value) { return value.is_null() || value == false; }

// Component of the type ByteLevel; what it does as a decoder or post-processor depends on no option.
void read_byte_level(const Object& object, Unsupported& unsupported) {
  unsupported.other_keys(object, {"type", "add_prefix_space", "trim_offsets", "use_regex"});
}

void read_pre_tokenizer(const Object& object, TokenizerJson& result, Unsupported& unsupported) {
  std::vector<Object> steps;
  if (object.string("type") == "Sequence") {
    unsupported.other_keys(object, {"type", "pretokenizers"});
    const json& array = object.array("pretokenizers");
    for (size_t i = 0; i < array.size(); ++i) {
      steps.emplace_back(array[i], object.place_of("pretokenizers") + "[" + std::to_string(i) + "]");
    }
  } else {
    steps.push_back(object);
  }
  bool byte_level = false;
  for (const Object& step : steps) {
    const std::string type = step.string("type");
    if (type == "Digits" && !byte_level) {
      unsupported.other_keys(step, {"type", "individual_digits"});
      unsupported.unless(step.boolean("individual_digits"), step, "individual_digits");
      result.split_digits = true;
    } else if (type == "ByteLevel" && !byte_level) {
      read_byte_level(step, unsupported);
      unsupported.unless(!step.boolean("add_prefix_space"), step, "add_prefix_space");
      const json& use_regex = step.get("use_regex");
      unsupported.unless(use_regex.is_null() || use_regex == true, step, "use_regex");
      byte_level = true;
    } else {
      unsupported.add(step.place() + " " + type + (byte_level ? " after ByteLevel" : ""));
    }
  }
  if (!byte_level) unsupported.add("a pre_tokenizer without ByteLevel");
}

void read_vocab(const Object& model, TokenizerJson& result) {
  const Object vocab = model.object("vocab");
  std::unordered_set<int32_t> ids;
  result.vocab.reserve(vocab.value().size());
  for (const auto& [token, value] : vocab.value().items()) {
    const int32_t id = token_id(value, vocab.place_of(token));
    TORCH_CHECK(ids.insert(id).second, "model.vocab has the id ", id, " twice, the second time for '", token, "'");
    result.vocab.emplace(token, id);
  }
}

void read_merges(const Object& model, TokenizerJson& result) {
  const json& merges = model.array("merges");
  result.merges.reserve(merges.size());
  for (size_t i = 0; i < merges.size(); ++i) {
    const json& merge = merges[i];
    if (merge.is_string()) {
      const auto& text = merge.get_ref<const std::string&>();
      const size_t space = text.find(' ');
      TORCH_CHECK(space != std::string::npos && text.find(' ', space + 1) == std::string::npos, "model.merges[", i,
                  "] is '", text, "', expected two tokens with one space between them");
      result.merges.emplace_back(text.substr(0, space), text.substr(space + 1));
    } else {
      TORCH_CHECK(merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string(),
                  "model.merges[", i, "] is ", short_dump(merge), ", expected two tokens");
      result.merges.emplace_back(merge[0].get<std::string>(), merge[1].get<std::string>());
    }
  }
}

void read_model(const Object& model, TokenizerJson& result, Unsupported& unsupported) {
  const std::string type = model.string("type");
  if (type != "BPE") return unsupported.add("model " + type);
  unsupported.other_keys(model, {"type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                                 "fuse_unk", "byte_fallback", "ignore_merges", "vocab", "merges"});
  for (const char* key : {"dropout", "unk_token"}) unsupported.unless(model.get(key).is_null(), model, key);
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    unsupported.unless(absent_or_empty(model.get(key)), model, key);
  }
  for (const char* key : {"fuse_unk", "byte_fallback", "ignore_merges"}) {
    unsupported.unless(absent_or_false(model.get(key)), model, key);
  }
  read_vocab(model, result);
  read_merges(model, result);
}

void read_added_tokens(const json& tokens, TokenizerJson& result, Unsupported& unsupported) {
  for (size_t i = 0; i < tokens.size(); ++i) {
    const Object object(tokens[i], "added_tokens[" + std::to_string(i) + "]");
    unsupported.other_keys(object, {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"});
    unsupported.unless(!object.boolean("single_word"), object, "single_word");
    object.boolean("special");  // a special token is found in text like any other
    result.added_tokens.push_back({.content = object.string("content"),
                                   .id = token_id(object.at("id"), object.place_of("id")),
                                   .lstrip = object.boolean("lstrip"),
                                   .rstrip = object.boolean("rstrip"),
                                   .normalized = object.boolean("normalized")});
  }
}

// `tokenizers` does not believe the ids of added tokens: one that the vocabulary has keeps that id, any other gets the
// next free one. A file that says otherwise is refused.
void check_added_tokens(const TokenizerJson& file) {
  std::unordered_set<std::string> contents;
  int64_t next_free = static_cast<int64_t>(file.vocab.size());
  for (const AddedToken& token : file.added_tokens) {
    TORCH_CHECK(!token.content.empty(), "the added token ", token.id, " has no content");
    TORCH_CHECK(contents.insert(token.content).second, "the added token '", token.content, "' is there twice");
    const auto known = file.vocab.find(token.content);
    const int64_t expected = known != file.vocab.end() ? known->second : next_free;
    TORCH_CHECK(token.id == expected, "the added token '", token.content, "' has the id ", token.id, ", expected ",
                expected, known != file.vocab.end() ? " as in model.vocab" : ", the next free id");
    next_free = std::max<int64_t>(next_free, token.id + int64_t{1});
  }
}

TokenizerJson read(const json& root_value) {
  const Object root(root_value, "");
  TokenizerJson result;
  Unsupported unsupported;
  unsupported.other_keys(root, {"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer",
                                "post_processor", "decoder", "model"});
  unsupported.unless(root.string("version") == "1.0", root, "version");
  for (const char* key : {"truncation", "padding"}) unsupported.unless(root.get(key).is_null(), root, key);
  if (!root.get("normalizer").is_null()) unsupported.add("normalizer " + root.object("normalizer").string("type"));
  read_pre_tokenizer(root.object("pre_tokenizer"), result, unsupported);
  for (const std::string key : {"post_processor", "decoder"}) {
    if (key == "post_processor" && root.get(key).is_null()) continue;
    const Object object = root.object(key);
    if (object.string("type") == "ByteLevel") {
      read_byte_level(object, unsupported);
    } else {
      unsupported.add(key + " " + object.string("type"));
    }
  }
  read_model(root.object("model"), result, unsupported);
  if (const json& added = root.get("added_tokens"); !added.is_null()) {
    read_added_tokens(root.array("added_tokens"), result, unsupported);
  }
  unsupported.check();
  check_added_tokens(result);
  return result;
}

}  // namespace

TokenizerJson read_tokenizer_json(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot open the file");
  try {
    return read(json::parse(file));
  } catch (const json::exception& error) {
    TORCH_CHECK(false, "it is not valid JSON: ", error.what());
  }
}

}  // namespace baseq
