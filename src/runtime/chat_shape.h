#pragma once

#include <optional>
#include <string>

#include "baseq/runtime/chat_template.h"

/// What a template was recognized as. Not installed.
namespace baseq {

enum class ChatFamily {
  kChatMl,
  kQwen3,
  kSmolLm3,
  kPhi4,
  kLlama2,
  kLlama3,
  kLlama31,
  kMistral,
  kMistralV7,
  kPhi3,
  kPhi4Mini,
  kGranite,
  kZephyr,
};

struct ChatTemplate::Shape {
  enum class System {
    kTurn,       ///< a turn of its own
    kFirstUser,  ///< in front of the first user message
    kLastUser,   ///< in front of the last one
    kNowhere,
    kRequired,  ///< a turn of its own; without one the template writes something that is not known
  };

  static constexpr const char* kDate = "%date";  ///< where default_system tells the date, as "March 05, 2026"

  std::string path;
  ChatFamily family = ChatFamily::kChatMl;
  const char* name = "";
  std::string end_of_turn;
  std::string bos;  ///< written first; empty: none
  std::string eos;  ///< of Llama 2, Mistral and Zephyr, where it ends a turn
  bool bos_each_turn = false;
  bool eos_last = false;  ///< Phi-3 and Phi-4-mini: eos follows an answer that nothing follows
  bool trim = false;      ///< white space around contents goes
  System system = System::kTurn;
  std::string default_system;   ///< the system message where the user gives none; empty: none is written
  std::string quiet_system;     ///< SmolLM3: that without thinking
  std::string date;             ///< Llama 3.1: what the template says; empty: today's
  bool opens_thinking = false;  ///< the answer starts within <think>
  bool shows_thoughts = false;  ///< Qwen3: those of an answer that nothing follows are written
  // Mistral.
  std::string open, close;  ///< around a user message
  std::string before_answer, after_answer;
};

}  // namespace baseq
