#include <c10/util/Exception.h>

#include "baseq/formats/open_model.h"
#include "formats/gguf/file.h"
#include "io/files.h"
#include "io/json_object.h"
#include "io/strict_json.h"

namespace baseq {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr size_t kMaxChatTemplateBytes = size_t{4} << 20;

json optional_file(const fs::path& path) {
  return fs::exists(path) ? read_json("chat", path, DuplicateKeys::kLastWins) : json::object();
}

/// A token is a text, or an object with "content".
std::string token_of(const json& config, const char* key) {
  if (!config.is_object()) return "";
  auto it = config.find(key);
  if (it == config.end()) return "";
  if (it->is_object()) {
    const auto content = it->find("content");
    return content != it->end() && content->is_string() ? content->get<std::string>() : "";
  }
  return it->is_string() ? it->get<std::string>() : "";
}

/// The template is a text, or there are several with names.
std::string template_of(const json& config) {
  const auto it = config.is_object() ? config.find("chat_template") : config.end();
  if (!config.is_object() || it == config.end()) return "";
  if (it->is_string()) return it->get<std::string>();
  if (!it->is_array()) return "";
  for (const json& named : *it) {
    const bool has_both =
        named.is_object() && named.value("name", json()).is_string() && named.value("template", json()).is_string();
    if (has_both && named["name"] == "default") return named["template"].get<std::string>();
  }
  return "";
}

StoredChat read_gguf_chat(const fs::path& path) {
  const GgufFile file(path);
  const json& metadata = file.metadata();
  StoredChat chat{.path = path.string()};
  const auto text = metadata.find("tokenizer.chat_template");
  if (text != metadata.end() && text->is_string()) chat.jinja = text->get<std::string>();
  const auto tokens = metadata.find("tokenizer.ggml.tokens");
  const auto token = [&](const char* key) -> std::string {
    const auto id = metadata.find(key);
    if (tokens == metadata.end() || !tokens->is_array() || id == metadata.end() || !id->is_number_unsigned()) return "";
    const auto index = id->get<uint64_t>();
    return index < tokens->size() && tokens->at(index).is_string() ? tokens->at(index).get<std::string>() : "";
  };
  chat.bos_token = token("tokenizer.ggml.bos_token_id");
  chat.eos_token = token("tokenizer.ggml.eos_token_id");
  return chat;
}

}  // namespace

StoredChat open_chat(const fs::path& path) {
  std::error_code error;
  if (fs::is_regular_file(path, error)) return read_gguf_chat(path);
  StoredChat chat{.path = path.string()};
  const json config = optional_file(path / "tokenizer_config.json");
  const json special = optional_file(path / "special_tokens_map.json");
  const fs::path jinja = path / "chat_template.jinja";
  chat.jinja = fs::exists(jinja) ? read_file("chat", jinja, kMaxChatTemplateBytes) : template_of(config);
  const auto token = [&](const char* key) {
    const std::string first = token_of(config, key);
    return first.empty() ? token_of(special, key) : first;
  };
  chat.bos_token = token("bos_token");
  chat.eos_token = token("eos_token");
  return chat;
}

}  // namespace baseq
