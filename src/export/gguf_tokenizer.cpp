#include "gguf_tokenizer.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "baseq/io/json_object.h"

namespace baseq {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

// llama.cpp's token types.
constexpr int32_t kNormal = 1, kControl = 3, kUserDefined = 4, kUnused = 5;

/// The pre-tokenizers that llama.cpp knows, by the regular expression of their Split.
const std::map<std::string, const char*> kSplits = {
    {R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|)"
     R"( ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)",
     "llama-bpe"},
    {R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|)"
     R"( ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)",
     "qwen2"}};

std::string pre_tokenizer_name(const json& pre, const std::string& path) {
  const json parts = pre.value("type", "") == "Sequence" ? pre.at("pretokenizers") : json::array({pre});
  const auto type = [&](size_t i) { return i < parts.size() ? parts[i].value("type", "") : ""; };
  if (parts.size() == 1 && type(0) == "ByteLevel" && parts[0].value("use_regex", true)) return "gpt-2";
  if (parts.size() == 2 && type(1) == "ByteLevel") {
    if (type(0) == "Digits" && parts[0].value("individual_digits", false) && parts[1].value("use_regex", true)) {
      return "smollm";
    }
    if (type(0) == "Split" && !parts[1].value("use_regex", true)) {
      const json& pattern = parts[0].at("pattern");
      const auto it = kSplits.find(pattern.value("Regex", ""));
      if (it != kSplits.end()) return it->second;
    }
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

void add_gguf_tokenizer(GgufMetadata& metadata, const Checkpoint& checkpoint, int64_t vocab_size) {
  const fs::path path = checkpoint.path() / "tokenizer.json";
  TORCH_CHECK(fs::exists(path), path.string(), ": does not exist; a GGUF file holds the tokenizer");
  const json tokenizer = read_json_file(path.string());
  const json& model = tokenizer.at("model");
  TORCH_CHECK(model.value("type", "") == "BPE" && !model.value("byte_fallback", false), path.string(), ": model is ",
              model.value("type", ""), model.value("byte_fallback", false) ? " with byte_fallback" : "",
              "; format gguf carries byte-level BPE");

  std::vector<std::string> tokens(static_cast<size_t>(vocab_size));
  std::vector<int32_t> types(tokens.size(), kUnused);
  const auto put = [&](int64_t id, const std::string& token, int32_t type) {
    TORCH_CHECK(id >= 0 && id < vocab_size, path.string(), ": token id ", id, " but the model knows 0 to ",
                vocab_size - 1);
    tokens[static_cast<size_t>(id)] = token;
    types[static_cast<size_t>(id)] = type;
  };
  for (const auto& [token, id] : model.at("vocab").items()) put(id.get<int64_t>(), token, kNormal);
  for (const json& added : tokenizer.value("added_tokens", json::array())) {
    put(added.at("id").get<int64_t>(), added.at("content").get<std::string>(),
        added.value("special", false) ? kControl : kUserDefined);
  }
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (types[i] == kUnused) tokens[i] = fmt::format("[PAD{}]", i);
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
  add_id(metadata, checkpoint.config(), "bos_token_id", "tokenizer.ggml.bos_token_id");
  add_id(metadata, checkpoint.config(), "eos_token_id", "tokenizer.ggml.eos_token_id");
  add_id(metadata, checkpoint.config(), "pad_token_id", "tokenizer.ggml.padding_token_id");
  const json config = optional_json(checkpoint.path() / "tokenizer_config.json");
  metadata.add("tokenizer.ggml.add_bos_token", adds_bos(tokenizer, config));
  const fs::path jinja = checkpoint.path() / "chat_template.jinja";
  if (const auto it = config.find("chat_template"); it != config.end() && it->is_string()) {
    metadata.add("tokenizer.chat_template", it->get<std::string>());
  } else if (fs::exists(jinja)) {
    std::ostringstream text;
    text << std::ifstream(jinja, std::ios::binary).rdbuf();
    metadata.add("tokenizer.chat_template", text.str());
  }
}

}  // namespace baseq
