#include "pipeline/calibration_documents.h"

#include <c10/util/Exception.h>

#include "baseq/formats/open_model.h"
#include "baseq/runtime/generate.h"
#include "pipeline/run_description.h"
#include "tokenizer/text_files.h"

namespace baseq {
namespace {

using nlohmann::json;

bool has_text(const json& object, const char* key) { return object.contains(key) && object[key].is_string(); }

void read_messages(const json& messages, CalibrationDocument& document) {
  TORCH_CHECK(messages.is_array() && !messages.empty(), document.where, ": \"messages\" is no list of messages");
  for (size_t i = 0; i < messages.size(); ++i) {
    const json& message = messages[i];
    TORCH_CHECK(message.is_object() && has_text(message, "role") && message.contains("content"), document.where,
                ": message ", i + 1, " is no object with a string \"role\" and a \"content\"");
    if (!has_text(message, "content") && document.unusable.empty()) {
      document.unusable = "the content of message " + std::to_string(i + 1) + " is no string";
    }
    document.messages.push_back({message["role"], has_text(message, "content") ? message["content"] : ""});
  }
}

}  // namespace

std::vector<CalibrationDocument> read_documents(const std::filesystem::path& file) {
  check_text_file(file);
  std::vector<CalibrationDocument> documents;
  if (extension_of(file) != ".jsonl") {
    documents.push_back({.where = file.string(), .text = read_text(file)});
    return documents;
  }
  for_each_record(file, [&](json& record, const std::string& where) {
    CalibrationDocument document{.where = where, .text = {}};
    if (record.is_object() && record.contains("messages") && !record.contains("text")) {
      read_messages(record["messages"], document);
    } else {
      TORCH_CHECK(record.is_object() && has_text(record, "text"), where,
                  ": expected an object with a string \"text\" or a list \"messages\"");
      document.text = std::move(record["text"].get_ref<std::string&>());
    }
    documents.push_back(std::move(document));
  });
  TORCH_CHECK(!documents.empty(), file.string(), ": holds no documents");
  return documents;
}

const Tokenizer& DocumentEncoder::tokenizer() {
  if (!tokenizer_) tokenizer_ = std::make_unique<Tokenizer>(open_tokenizer(model_path(job_)));
  return *tokenizer_;
}

int32_t DocumentEncoder::eos() {
  if (eos_) return *eos_;
  const std::string token = open_chat(model_path(job_)).eos_token;
  if (!token.empty()) eos_ = tokenizer().added_token(token);
  if (!eos_) {
    const std::vector<int32_t> ids = read_generation_config(stored_model(job_).tensors).eos;
    TORCH_CHECK(!ids.empty(), model_path(job_).string(), ": names no EOS token, with which packed texts end");
    eos_ = ids.front();
  }
  return *eos_;
}

std::vector<int32_t> DocumentEncoder::encode(const CalibrationDocument& document, std::string& why) {
  std::vector<int32_t> ids;
  const Tokenizer& known = tokenizer();
  if (document.messages.empty()) {
    try {
      ids = known.encode(document.text);
    } catch (const c10::Error& error) {
      TORCH_CHECK(false, document.where, ": ", error.what_without_backtrace());
    }
    if (ids.empty() || ids.back() != eos()) ids.push_back(eos());
    return ids;
  }
  if (!chat_) chat_ = std::make_unique<ChatTemplate>(open_chat(model_path(job_)));
  why = document.unusable;
  if (!why.empty()) return ids;
  try {
    ids = chat_->encode(known, document.messages, Date{});
  } catch (const c10::Error& error) {
    why = error.what_without_backtrace();
  }
  return ids;
}

}  // namespace baseq
