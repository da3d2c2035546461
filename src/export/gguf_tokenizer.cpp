#include "gguf_tokenizer.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "../model/gguf_tokenizer_json.h"
#include "baseq/io/json_object.h"

namespace baseq {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

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
  for (const auto& [name, known] : gguf_pre_tokenizers()) {
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
  add_id(metadata, checkpoint.config(), "bos_token_id", "tokenizer.ggml.bos_token_id");
  add_id(metadata, checkpoint.config(), "eos_token_id", "tokenizer.ggml.eos_token_id");
  add_id(metadata, checkpoint.config(), "pad_token_id", "tokenizer.ggml.padding_token_id");
  const json config = optional_json(checkpoint.directory() / "tokenizer_config.json");
  metadata.add("tokenizer.ggml.add_bos_token", adds_bos(tokenizer, config));
  const fs::path jinja = checkpoint.directory() / "chat_template.jinja";
  if (const auto it = config.find("chat_template"); it != config.end() && it->is_string()) {
    metadata.add("tokenizer.chat_template", it->get<std::string>());
  } else if (fs::exists(jinja)) {
    std::ostringstream text;
    text << std::ifstream(jinja, std::ios::binary).rdbuf();
    metadata.add("tokenizer.chat_template", text.str());
  }
}

}  // namespace baseq
