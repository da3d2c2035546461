#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "baseq/formats/open_model.h"
#include "baseq/tokenizer/tokenizer.h"

#pragma GCC visibility push(default)
namespace baseq {

/// One turn of a conversation.
struct Message {
  std::string role{};  ///< "system", "user" or "assistant"
  std::string content{};
};

/// Some templates tell the model the date.
struct Date {
  int year = 2024, month = 1, day = 1;
  static Date today();  ///< in the local time zone
};

/// Writes conversations as a chat model was trained to read them. The template of a checkpoint is Jinja, a programming
/// language; here the known ones are recognized by their text and written in C++ instead: docs/runtime.md lists them.
///   const ChatTemplate chat(open_chat(path));
///   generate(session.logits(), tokenizer, chat.encode(tokenizer, {{{"user", "Hello"}}}), options);
class ChatTemplate {
 public:
  /// Throws c10::Error naming the file and what is not known in its template, or that there is none.
  explicit ChatTemplate(const StoredChat& stored);
  ~ChatTemplate();
  ChatTemplate(ChatTemplate&&) noexcept;
  ChatTemplate& operator=(ChatTemplate&&) noexcept;

  const char* name() const;  ///< "ChatML", "Llama 3", ...
  /// The token that ends a turn, as "<|im_end|>".
  const std::string& end_of_turn() const;

  /// The conversation, then the start of the assistant's answer, unless the last message is an answer. Only what the
  /// template itself writes can be a special token.
  /// @param messages maybe a system message, then those of user and assistant by turns; throws c10::Error for any other
  ///                 order, and for a system message that the template has no place for
  std::vector<TextPart> render(std::span<const Message> messages, const Date& today = Date::today()) const;
  std::vector<int32_t> encode(const Tokenizer& tokenizer, std::span<const Message> messages,
                              const Date& today = Date::today()) const;

 private:
  struct Shape;
  class Writer;
  friend class ChatTemplateReader;
  std::unique_ptr<const Shape> shape_;
};

}  // namespace baseq
#pragma GCC visibility pop
