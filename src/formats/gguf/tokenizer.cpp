#include "formats/gguf/tokenizer.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>

#include "formats/gguf/names.h"
#include "io/files.h"
#include "io/json_object.h"
#include "io/strict_json.h"
#include "tokenizer/unicode.h"

namespace baseq {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr size_t kMaxTemplateBytes = size_t{16} << 20;

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
              "; name a tokenizer.json with `tokenizer`, or evaluate `tokens`");
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

// llama.cpp's token types.
enum class GgufTokenType : int32_t { kNormal = 1, kControl = 3, kUserDefined = 4, kUnused = 5 };

/// llama.cpp's names of the pre-tokenizers that are known -> what tokenizer.json says for them.
const std::map<std::string, json>& pre_tokenizers() {
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

/// llama.cpp's name of a pre-tokenizer: what decides is which parts there are, their patterns and use_regex.
std::string pre_tokenizer_name(const json& pre, const std::string& path) {
  const auto essence = [](const json& value) {
    json parts = json::array();
    for (const json& part : value.value("type", "") == "Sequence" ? value.at("pretokenizers") : json::array({value})) {
      const std::string type = part.value("type", "");
      json kept{{"type", type}};
      if (type == "ByteLevel") kept["use_regex"] = part.value("use_regex", true);
      if (type == "Digits") kept["individual_digits"] = part.value("individual_digits", false);
      if (type == "Split") kept["pattern"] = part.at("pattern");
      parts.push_back(kept);
    }
    return parts;
  };
  for (const auto& [name, known] : pre_tokenizers()) {
    if (essence(pre) == essence(known)) return name;
  }
  TORCH_CHECK(false, path, ": pre_tokenizer ", pre.dump(),
              " is none that llama.cpp is known to have a name for; format hf keeps the tokenizer as it is");
}

/// A token id of config.json: a number, or the first of several.
void add_id(GgufMetadata& metadata, const json& config, const char* from, const char* to) {
  const auto it = config.find(from);
  if (it == config.end() || it->is_null()) return;
  const json& id = it->is_array() && !it->empty() ? it->front() : *it;
  if (id.is_number_integer() && id.get<int64_t>() >= 0) metadata.add(to, id.get<uint32_t>());
}

/// Whether the post-processor puts a special token in front.
bool adds_bos(const json& tokenizer, const json& config) {
  if (const auto it = config.find("add_bos_token"); it != config.end() && it->is_boolean()) return it->get<bool>();
  const auto starts = [](const json& processor) {
    const auto it = processor.find("single");
    return it != processor.end() && it->is_array() && !it->empty() && it->front().contains("SpecialToken");
  };
  const auto it = tokenizer.find("post_processor");
  if (it == tokenizer.end() || !it->is_object()) return false;
  if (const auto all = it->find("processors"); all != it->end() && all->is_array()) {
    return std::any_of(all->begin(), all->end(), starts);
  }
  return starts(*it);
}

json optional_json(const fs::path& path) { return fs::exists(path) ? read_json_file(path.string()) : json::object(); }

}  // namespace

json gguf_tokenizer_json(const GgufFile& file) {
  const std::string model = text_of(file, "tokenizer.ggml.model", required(file, "tokenizer.ggml.model"));
  const std::string pre = text_of(file, "tokenizer.ggml.pre", required(file, "tokenizer.ggml.pre"));
  const auto& known = pre_tokenizers();
  std::vector<std::string> names;
  for (const auto& [name, value] : known) names.push_back(name);
  TORCH_CHECK(model == "gpt2" && known.contains(pre), file.name(), ": the tokenizer is ", quote(model), " with ",
              quote(pre), " in front; supported is \"gpt2\" with ", fmt::format("{}", fmt::join(names, ", ")),
              "; name a tokenizer.json with `tokenizer`");
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

void add_gguf_tokenizer(GgufMetadata& metadata, const Checkpoint& checkpoint, int64_t vocab_size) {
  const fs::path path = checkpoint.directory() / "tokenizer.json";
  TORCH_CHECK(fs::exists(path), path.string(), ": does not exist; a GGUF file holds the tokenizer");
  const json tokenizer = read_json_file(path.string());
  const json& model = tokenizer.at("model");
  TORCH_CHECK(model.value("type", "") == "BPE" && !model.value("byte_fallback", false), path.string(), ": model is ",
              model.value("type", ""), model.value("byte_fallback", false) ? " with byte_fallback" : "",
              "; format gguf carries byte-level BPE");

  std::vector<std::string> tokens(static_cast<size_t>(vocab_size));
  std::vector<int32_t> types(tokens.size(), static_cast<int32_t>(GgufTokenType::kUnused));
  const auto put = [&](int64_t id, const std::string& token, GgufTokenType type) {
    TORCH_CHECK(id >= 0 && id < vocab_size, path.string(), ": token id ", id, " but the model knows 0 to ",
                vocab_size - 1);
    tokens[static_cast<size_t>(id)] = token;
    types[static_cast<size_t>(id)] = static_cast<int32_t>(type);
  };
  for (const auto& [token, id] : model.at("vocab").items()) put(id.get<int64_t>(), token, GgufTokenType::kNormal);
  for (const json& added : tokenizer.value("added_tokens", json::array())) {
    put(added.at("id").get<int64_t>(), added.at("content").get<std::string>(),
        added.value("special", false) ? GgufTokenType::kControl : GgufTokenType::kUserDefined);
  }
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (types[i] == static_cast<int32_t>(GgufTokenType::kUnused)) tokens[i] = fmt::format("[PAD{}]", i);
  }
  std::vector<std::string> merges;
  for (const json& merge : model.at("merges")) {
    merges.push_back(merge.is_string() ? merge.get<std::string>()
                                       : merge.at(0).get<std::string>() + " " + merge.at(1).get<std::string>());
  }

  metadata.add("tokenizer.ggml.model", "gpt2");
  metadata.add("tokenizer.ggml.pre",
               pre_tokenizer_name(tokenizer.value("pre_tokenizer", json::object()), path.string()));
  metadata.add("tokenizer.ggml.tokens", tokens);
  metadata.add("tokenizer.ggml.token_type", types);
  metadata.add("tokenizer.ggml.merges", merges);
  for (const auto& [key, field] : kGgufTokenIds) add_id(metadata, checkpoint.config(), field, key);
  const json config = optional_json(checkpoint.directory() / "tokenizer_config.json");
  metadata.add("tokenizer.ggml.add_bos_token", adds_bos(tokenizer, config));
  const fs::path jinja = checkpoint.directory() / "chat_template.jinja";
  if (const auto it = config.find("chat_template"); it != config.end() && it->is_string()) {
    metadata.add("tokenizer.chat_template", it->get<std::string>());
  } else if (fs::exists(jinja)) {
    metadata.add("tokenizer.chat_template", read_file("export", jinja, kMaxTemplateBytes));
  }
}

}  // namespace baseq
