#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "baseq/pipeline/job.h"
#include "baseq/runtime/chat_template.h"
#include "baseq/tokenizer/tokenizer.h"

namespace baseq {

/// A text, or a conversation, of a calibration file.
struct CalibrationDocument {
  std::string where;  ///< file and line
  std::string text;
  std::vector<Message> messages{};  ///< empty: it is a text
  std::string unusable{};           ///< what of a conversation is no text; empty: nothing
};

/// Those of a .jsonl file, or a text file as one. Throws c10::Error naming the file and the line that is malformed.
std::vector<CalibrationDocument> read_documents(const std::filesystem::path& file);

/// Tokenizes documents for the model of a job, of which it opens what they need.
class DocumentEncoder {
 public:
  /// @param job must outlive this
  explicit DocumentEncoder(const Job& job) : job_(job) {}

  /// Throws c10::Error when the model has no tokenizer.
  const Tokenizer& tokenizer();
  /// A text and an EOS token, unless the tokenizer writes one, or a conversation, which ends as the chat template says.
  /// Empty for a conversation that it has no place for; `why` then says what. Throws c10::Error for text that is not
  /// UTF-8, and when the model has no EOS token or no chat template that is known.
  std::vector<int32_t> encode(const CalibrationDocument& document, std::string& why);

 private:
  int32_t eos();
  const Job& job_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<ChatTemplate> chat_;
  std::optional<int32_t> eos_;
};

}  // namespace baseq
