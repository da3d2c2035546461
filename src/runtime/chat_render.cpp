#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <ctime>
#include <string_view>
#include <utility>

#include "runtime/chat_shape.h"
#include "tokenizer/unicode.h"

namespace baseq {
namespace {

constexpr const char* kMonths[] = {"January", "February", "March",     "April",   "May",      "June",
                                   "July",    "August",   "September", "October", "November", "December"};

/// Python's str.isspace, which also takes the separators U+001C to U+001F.
bool is_python_space(char32_t c) { return CharTable::instance().is_space(c) || (c >= 0x1C && c <= 0x1F); }

std::string_view strip_right(std::string_view text) {
  while (!text.empty()) {
    const auto [c, num_bytes] = code_point_before(text, text.size());
    if (!is_python_space(c)) break;
    text.remove_suffix(num_bytes);
  }
  return text;
}

std::string_view strip(std::string_view text) {
  text = strip_right(text);
  while (!text.empty()) {
    const auto [c, num_bytes] = code_point_at(text, 0);
    if (!is_python_space(c)) break;
    text.remove_prefix(num_bytes);
  }
  return text;
}

std::string_view without_first_lines(std::string_view text) {
  text.remove_prefix(std::min(text.find_first_not_of('\n'), text.size()));
  return text;
}

/// What is left behind the last </think>.
std::string_view without_thinking(std::string_view text) {
  constexpr std::string_view kEnd = "</think>";
  const size_t end = text.rfind(kEnd);
  return end == text.npos ? text : without_first_lines(text.substr(end + kEnd.size()));
}

std::string replaced(std::string text, std::string_view from) {
  for (size_t at = text.find(from); at != text.npos; at = text.find(from, at)) text.erase(at, from.size());
  return text;
}

}  // namespace

Date Date::today() {
  const std::time_t now = std::time(nullptr);
  std::tm local{};
  ::localtime_r(&now, &local);
  return {local.tm_year + 1900, local.tm_mon + 1, local.tm_mday};
}

/// Writes one conversation. A family is a function; what a user or the model said goes through said().
class ChatTemplate::Writer {
 public:
  Writer(const Shape& shape, std::span<const Message> messages, const Date& today)
      : shape_(shape), today_(today), messages_(messages) {
    check();
    if (messages_[0].role == "system") {
      system_ = messages_[0].content;
      has_system_ = true;
      messages_ = messages_.subspan(1);
    }
  }

  std::vector<TextPart> write() {
    if (!shape_.bos.empty() && !shape_.bos_each_turn) token(shape_.bos);
    switch (shape_.family) {
      case ChatFamily::kChatMl:
      case ChatFamily::kQwen3:
        return chatml();
      case ChatFamily::kSmolLm3:
        return smollm3();
      case ChatFamily::kPhi4:
        return phi4();
      case ChatFamily::kLlama2:
        return llama2();
      case ChatFamily::kLlama3:
      case ChatFamily::kLlama31:
        return llama3();
      case ChatFamily::kMistral:
        return mistral();
      case ChatFamily::kMistralV7:
        return mistral_v7();
      case ChatFamily::kPhi3:
      case ChatFamily::kPhi4Mini:
        return phi3();
      case ChatFamily::kGranite:
        return granite();
      case ChatFamily::kZephyr:
        return zephyr();
    }
    TORCH_INTERNAL_ASSERT(false);
  }

 private:
  void check() const {
    const size_t first = !messages_.empty() && messages_[0].role == "system" ? 1 : 0;
    TORCH_CHECK(messages_.size() > first, "chat: expected a conversation with a user message");
    for (size_t i = first; i < messages_.size(); ++i) {
      const char* expected = (i - first) % 2 == 0 ? "user" : "assistant";
      TORCH_CHECK(messages_[i].role == expected, "chat: message ", i + 1, " is from \"", messages_[i].role,
                  "\"; expected one from the ", expected);
    }
    using System = Shape::System;
    TORCH_CHECK(first == 0 || shape_.system != System::kNowhere, shape_.path,
                ": the chat template has no place for a `system` message");
    TORCH_CHECK(first == 1 || shape_.system != System::kRequired, shape_.path,
                ": the chat template writes a system message that is not known; give a `system` message");
  }

  void token(const std::string& marker) { parts_.push_back({marker, AddedTokens::kAll}); }
  void text(std::string_view fixed) { parts_.push_back({std::string(fixed), AddedTokens::kNone}); }
  /// The model's own words may hold tokens such as <think>, which are not special.
  void said(const Message& message) { said(message, message.content); }
  void said(const Message& message, std::string_view content) {
    const bool own = message.role == "assistant";
    parts_.push_back(
        {std::string(shape_.trim ? strip(content) : content), own ? AddedTokens::kNotSpecial : AddedTokens::kNone});
  }
  std::vector<TextPart> done() { return std::move(parts_); }
  /// Whether the assistant has the last word, so that no answer of it begins.
  bool answered() const { return messages_.back().role == "assistant"; }

  std::string month(size_t length = std::string::npos) const {
    return std::string(kMonths[std::clamp(today_.month, 1, 12) - 1]).substr(0, length);
  }

  /// The system message, or the template's own, as the first turn of write_turn(message).
  template <class WriteTurn>
  void each_turn(WriteTurn&& write_turn) {
    const std::string& system = has_system_ ? system_ : shape_.default_system;
    if (has_system_ || !system.empty()) write_turn(Message{"system", system});
    for (const Message& message : messages_) write_turn(message);
  }

  std::vector<TextPart> chatml() {
    each_turn([&](const Message& message) {
      const bool answer = shape_.family == ChatFamily::kQwen3 && message.role == "assistant";
      token("<|im_start|>");
      text(message.role + "\n");
      std::string_view content = answer ? without_thinking(message.content) : message.content;
      if (answer && shape_.shows_thoughts && &message == &messages_.back()) {
        thoughts(message);
        content = without_first_lines(content);
      }
      said(message, content);
      token("<|im_end|>");
      text("\n");
    });
    if (answered()) return done();
    token("<|im_start|>");
    text("assistant\n");
    if (shape_.opens_thinking) {
      token("<think>");
      text("\n");
    }
    return done();
  }

  /// Qwen3's last answer shows what it thought, or that it did not.
  void thoughts(const Message& message) {
    std::string_view thought = message.content;
    const size_t end = thought.find("</think>");
    thought = end == thought.npos ? "" : thought.substr(0, end);
    if (const size_t begin = thought.rfind("<think>"); begin != thought.npos) thought.remove_prefix(begin + 7);
    thought = without_first_lines(thought);
    thought = thought.substr(0, thought.find_last_not_of('\n') + 1);
    token("<think>");
    text("\n");
    said(message, thought);
    text("\n");
    token("</think>");
    text("\n\n");
  }

  std::vector<TextPart> smollm3() {
    const bool thinks = system_.find("/no_think") == system_.npos;
    const std::string instructions(strip_right(replaced(replaced(system_, "/no_think"), "/think")));
    token("<|im_start|>");
    text("system\n");
    if (system_.find("/system_override") != system_.npos) {
      text(strip_right(replaced(instructions, "/system_override")));
      token("<|im_end|>");
      text("\n");
    } else {
      text(
          fmt::format("## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: {:02} {} {}\nReasoning Mode: {}\n\n"
                      "## Custom Instructions\n\n",
                      today_.day, month(), today_.year, thinks ? "/think" : "/no_think"));
      if (!instructions.empty()) {
        text(instructions + "\n\n");
      } else {
        // The template names its own tokens.
        parts_.push_back({thinks ? shape_.default_system : shape_.quiet_system, AddedTokens::kNotSpecial});
      }
    }
    const auto start = [&](const std::string& role) {
      token("<|im_start|>");
      text(role + "\n");
      if (role == "user" || thinks) return;
      token("<think>");
      text("\n\n");
      token("</think>");
      text("\n");
    };
    for (const Message& message : messages_) {
      start(message.role);
      said(message, message.role == "user" ? message.content : without_first_lines(message.content));
      token("<|im_end|>");
      text("\n");
    }
    if (!answered()) start("assistant");
    return done();
  }

  std::vector<TextPart> phi4() {
    const auto start = [&](const std::string& role) {
      token("<|im_start|>");
      text(role);
      token("<|im_sep|>");
    };
    each_turn([&](const Message& message) {
      start(message.role);
      said(message);
      token("<|im_end|>");
    });
    if (!answered()) start("assistant");
    return done();
  }

  std::vector<TextPart> llama2() {
    for (size_t i = 0; i < messages_.size(); ++i) {
      const Message& message = messages_[i];
      if (message.role == "assistant") {
        text(" ");
        said(message);
        text(" ");
        token(shape_.eos);
        continue;
      }
      if (shape_.bos_each_turn) token(shape_.bos);
      text("[INST] ");
      const std::string system = i == 0 && has_system_ ? "<<SYS>>\n" + system_ + "\n<</SYS>>\n\n" : "";
      said(message, system + message.content);
      text(" [/INST]");
    }
    return done();
  }

  std::vector<TextPart> llama3() {
    const auto start = [&](const std::string& role) {
      token("<|start_header_id|>");
      text(role);
      token("<|end_header_id|>");
      text("\n\n");
    };
    if (shape_.family == ChatFamily::kLlama31) {
      start("system");
      const std::string date = fmt::format("{:02} {} {}", today_.day, month(3), today_.year);
      text("Cutting Knowledge Date: December 2023\nToday Date: " + (shape_.date.empty() ? date : shape_.date) + "\n\n");
      said({"system", system_});
      token("<|eot_id|>");
      has_system_ = false;
    }
    each_turn([&](const Message& message) {
      start(message.role);
      said(message);
      token("<|eot_id|>");
    });
    if (!answered()) start("assistant");
    return done();
  }

  std::vector<TextPart> mistral() {
    const size_t with_system = shape_.system == Shape::System::kLastUser ? messages_.size() - 1 : 0;
    for (size_t i = 0; i < messages_.size(); ++i) {
      const Message& message = messages_[i];
      if (message.role == "assistant") {
        answer(message);
        continue;
      }
      instruction(has_system_ && i == with_system ? system_ + "\n\n" + message.content : message.content);
    }
    return done();
  }

  std::vector<TextPart> mistral_v7() {
    if (has_system_) {
      token("[SYSTEM_PROMPT]");
      if (!shape_.before_answer.empty()) text(" ");
      text(system_);
      token("[/SYSTEM_PROMPT]");
    }
    for (const Message& message : messages_) {
      if (message.role == "assistant") {
        answer(message);
      } else {
        instruction(message.content);
      }
    }
    return done();
  }

  /// `open` and `close` hold a marker and spaces around it.
  void instruction(std::string_view content) {
    const auto around = [&](std::string_view whole, const std::string& marker) {
      const size_t at = whole.find(marker);
      text(whole.substr(0, at));
      token(marker);
      text(whole.substr(at + marker.size()));
    };
    around(shape_.open, "[INST]");
    text(content);
    around(shape_.close, "[/INST]");
  }
  void answer(const Message& message) {
    text(shape_.before_answer);
    said(message);
    token(shape_.eos);
    text(shape_.after_answer);
  }

  std::vector<TextPart> phi3() {
    const char* line = shape_.family == ChatFamily::kPhi3 ? "\n" : "";
    each_turn([&](const Message& message) {
      token("<|" + message.role + "|>");
      text(line);
      said(message);
      token("<|end|>");
      text(line);
    });
    if (answered()) {
      if (shape_.eos_last) token(shape_.eos);
      return done();
    }
    token("<|assistant|>");
    text(line);
    return done();
  }

  std::vector<TextPart> granite() {
    if (const size_t at = shape_.default_system.find(Shape::kDate); !has_system_ && at != std::string::npos) {
      has_system_ = true;
      system_ = shape_.default_system;
      system_.replace(at, std::string_view(Shape::kDate).size(),
                      fmt::format("{} {:02}, {}", month(), today_.day, today_.year));
    }
    const auto start = [&](const std::string& role) {
      token("<|start_of_role|>");
      text(role);
      token("<|end_of_role|>");
    };
    each_turn([&](const Message& message) {
      start(message.role);
      said(message);
      token("<|end_of_text|>");
      text("\n");
    });
    if (!answered()) start("assistant");
    return done();
  }

  std::vector<TextPart> zephyr() {
    each_turn([&](const Message& message) {
      token("<|" + message.role + "|>");
      text("\n");
      said(message);
      token(shape_.eos);
      text("\n");
    });
    if (answered()) return done();
    token("<|assistant|>");
    text("\n");
    return done();
  }

  const Shape& shape_;
  const Date& today_;
  std::span<const Message> messages_;  ///< without the system message
  std::string system_;
  bool has_system_ = false;
  std::vector<TextPart> parts_;
};

std::vector<TextPart> ChatTemplate::render(std::span<const Message> messages, const Date& today) const {
  return Writer(*shape_, messages, today).write();
}

std::vector<int32_t> ChatTemplate::encode(const Tokenizer& tokenizer, std::span<const Message> messages,
                                          const Date& today) const {
  std::vector<TextPart> parts = render(messages, today);
  for (TextPart& part : parts) {
    // [INST] is a token of some vocabularies and text in others, where it belongs to the text around it.
    if (part.recognized == AddedTokens::kAll && !tokenizer.added_token(part.text)) part.recognized = AddedTokens::kNone;
  }
  return tokenizer.encode(parts);
}

}  // namespace baseq
