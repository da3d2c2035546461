#include "baseq/runtime/chat_template.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cctype>
#include <set>
#include <string_view>
#include <utility>

#include "runtime/chat_shape.h"

namespace baseq {

/// Recognizes one template by the texts in it.
class ChatTemplateReader {
 public:
  using Shape = ChatTemplate::Shape;
  explicit ChatTemplateReader(const StoredChat& stored) : stored_(stored), text_(stored.jinja) {}

  Shape read() {
    TORCH_CHECK(!stored_.jinja.empty(), stored_.path, ": has no chat template");
    Shape shape = recognized();
    shape.path = stored_.path;
    if (has("bos_token")) shape.bos = stored_.bos_token;
    shape.eos = stored_.eos_token;
    if (shape.end_of_turn.empty()) shape.end_of_turn = stored_.eos_token;
    return shape;
  }

 private:
  bool has(std::string_view text) const { return text_.find(text) != text_.npos; }
  bool has_any(std::initializer_list<std::string_view> texts) const {
    return std::ranges::any_of(texts, [&](std::string_view text) { return has(text); });
  }
  /// A line break in a template is written out, or is an escape in a string literal.
  bool has_line(const std::string& before, const std::string& after = "") const {
    return has(before + "\\n" + after) || has(before + "\n" + after);
  }

  [[noreturn]] void refuse(const std::string& what) const {
    TORCH_CHECK(false, stored_.path, ": the chat template is none that is known: ", what,
                "; known are ChatML, Qwen3, SmolLM3, Llama 2 and 3, Mistral, Phi-3 and 4, Granite and Zephyr");
  }

  Shape recognized() const {
    if (has("<|im_start|>")) return has("<|im_sep|>") ? phi4() : chatml();
    if (has("<|start_header_id|>")) return llama3();
    if (has("<|start_of_role|>")) return granite();
    if (has("[INST]")) return has("<<SYS>>") ? llama2() : has("[SYSTEM_PROMPT]") ? mistral_v7() : mistral();
    if (has("<|end|>")) return phi3();
    if (has("<|user|>") && has("<|assistant|>") && has("eos_token")) return zephyr();
    const std::set<std::string> markers = markers_of();
    refuse(markers.empty() ? "it has no known marker of a turn" : "it has " + *markers.begin());
  }

  /// All <|name|> in the text.
  std::set<std::string> markers_of() const {
    std::set<std::string> found;
    for (size_t at = text_.find("<|"); at != text_.npos; at = text_.find("<|", at + 2)) {
      size_t end = at + 2;
      while (end < text_.size() &&
             (std::isalnum(static_cast<unsigned char>(text_[end])) != 0 || text_[end] == '_' || text_[end] == '/')) {
        ++end;
      }
      if (end > at + 2 && text_.substr(end, 2) == "|>") found.emplace(text_.substr(at, end + 2 - at));
    }
    return found;
  }

  void allow_markers(const std::set<std::string>& known) const {
    for (const std::string& marker : markers_of()) {
      if (!known.contains(marker)) refuse("it has " + marker);
    }
  }

  /// Whether the filter or method, as "trim" or "strip(", is applied to what somebody said.
  bool applies_to_content(std::string_view name) const {
    constexpr std::string_view kContent = "content";
    for (size_t at = text_.find(name); at != text_.npos; at = text_.find(name, at + 1)) {
      const size_t end = text_.substr(0, at).find_last_not_of(" |.'\"]");
      if (end != text_.npos && text_.substr(0, end + 1).ends_with(kContent)) return true;
    }
    return false;
  }

  /// The string literal that `text` starts with, behind its quote; nothing when it has no end.
  std::optional<std::string> literal(std::string_view text, char quote) const {
    std::string value;
    for (size_t i = 0; i < text.size(); ++i) {
      if (text[i] == quote) return value;
      if (text[i] == '\\' && i + 1 < text.size()) {
        const char escaped = text[++i];
        value += escaped == 'n' ? '\n' : escaped;
      } else {
        value += text[i];
      }
    }
    return std::nullopt;
  }

  /// The first literals that begin with `start`.
  std::vector<std::string> literals(std::string_view start) const {
    std::vector<std::string> found;
    for (size_t at = text_.find(start); at != text_.npos; at = text_.find(start, at + 1)) {
      if (at == 0 || (text_[at - 1] != '"' && text_[at - 1] != '\'')) continue;
      if (auto value = literal(text_.substr(at), text_[at - 1])) found.push_back(std::move(*value));
    }
    return found;
  }

  /// The text between `before`, a line break and `after` within one literal.
  std::string text_between(const std::string& before, std::string_view after) const {
    for (size_t at = text_.find(before); at != text_.npos; at = text_.find(before, at + 1)) {
      std::string_view rest = text_.substr(at + before.size());
      if (rest.starts_with("\\n")) {
        rest.remove_prefix(2);
      } else if (rest.starts_with("\n")) {
        rest.remove_prefix(1);
      } else {
        continue;
      }
      const size_t end = std::min(rest.find(after), rest.size());
      const std::string_view inside = rest.substr(0, end);
      if (end < rest.size() && !inside.empty() && inside.find_first_of("'\"{}\\") == inside.npos) {
        return std::string(inside);
      }
    }
    return "";
  }

  Shape chatml() const {
    allow_markers({"<|im_start|>", "<|im_end|>", "<|endoftext|>"});
    if (has("/no_think") && has("## Custom Instructions")) return smollm3();
    if (!has_any({"<|im_end|>\\n", "<|im_end|>\n", "<|im_end|>' + '\\n", "<|im_end|>' + '\n", "<|im_end|>\" + \"\\n",
                  "<|im_end|>'+'\\n", "<|im_end|>' ~ '\\n"})) {
      refuse("its turns do not end in <|im_end|> and a line break");
    }
    Shape shape{.family = ChatFamily::kChatMl, .name = "ChatML", .end_of_turn = "<|im_end|>"};
    if (has("</think>")) {
      if (!has_any({"split('</think>')[-1].lstrip('\\n')", "split(\"</think>\")[-1].lstrip(\"\\n\")"})) {
        refuse("it treats </think> in its own way");
      }
      if (has("if not enable_thinking")) refuse("it does not think unless asked to");
      shape.family = ChatFamily::kQwen3;
      shape.name = "Qwen3";
      shape.shows_thoughts = has("reasoning_content");
      shape.opens_thinking =
          has_line("<|im_start|>assistant", "<think>\\n'") || has_line("<|im_start|>assistant", "<think>\\n\"");
    } else if (applies_to_content("trim") || applies_to_content("strip(")) {
      refuse("it trims what is said");
    }
    if (has_any({"set system_message", "default_system"})) refuse("it makes a system message in its own way");
    shape.default_system = text_between("<|im_start|>system", "<|im_end|>");
    return shape;
  }

  Shape smollm3() const {
    const std::vector<std::string> defaults = literals("You are a helpful AI assistant named SmolLM");
    if (defaults.size() != 2 || !has("Knowledge Cutoff Date: June 2025") || !has("Today Date: "))
      refuse("it is another one than SmolLM3-3B's");
    return {.family = ChatFamily::kSmolLm3,
            .name = "SmolLM3",
            .end_of_turn = "<|im_end|>",
            .default_system = defaults[0],
            .quiet_system = defaults[1]};
  }

  Shape phi4() const {
    allow_markers({"<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|endoftext|>"});
    return {.family = ChatFamily::kPhi4, .name = "Phi-4", .end_of_turn = "<|im_end|>"};
  }

  Shape llama3() const {
    allow_markers({"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
                   "<|python_tag|>", "<|end_of_text|>"});
    Shape shape{.family = ChatFamily::kLlama3, .name = "Llama 3", .end_of_turn = "<|eot_id|>", .trim = has("trim")};
    if (!has("Knowledge Date")) return shape;
    const std::vector<std::string> dates = literals("26 Jul");
    if (!has("Cutting Knowledge Date: December 2023\\n") || !has("Today Date: ") || dates.size() != 1) {
      refuse("it tells another date than Llama 3.1's and 3.2's");
    }
    shape.family = ChatFamily::kLlama31;
    shape.name = "Llama 3.1";
    if (!has("strftime_now")) shape.date = dates[0];
    return shape;
  }

  Shape granite() const {
    if (!has("<|end_of_role|>") || !has_line("<|end_of_text|>")) refuse("its turns are not those of Granite 3");
    Shape shape{.family = ChatFamily::kGranite, .name = "Granite", .end_of_turn = "<|end_of_text|>"};
    if (!has_any({"set system_message", "default_system"})) return shape;
    const std::string cutoff = "Knowledge Cutoff Date: April 2024.";
    const bool lines = has_line(cutoff, "Today's Date: ");
    if (!(lines || has(cutoff + " Today's Date: ")) || !has("You are Granite, developed by IBM.") ||
        !has("\" You are a helpful AI assistant.\"")) {
      shape.system = Shape::System::kRequired;
      return shape;
    }
    const std::string space = lines ? "\n" : " ";
    shape.default_system = cutoff + space + "Today's Date: " + Shape::kDate + "." + space +
                           "You are Granite, developed by IBM. You are a helpful AI assistant.";
    return shape;
  }

  Shape llama2() const {
    if (has("true == true")) refuse("it has a default system message of its own");
    return {.family = ChatFamily::kLlama2,
            .name = "Llama 2",
            .bos_each_turn = has_any({"bos_token + '[INST]", "bos_token+'[INST]", "bos_token + \"[INST]"}),
            .trim = has_any({"strip()", "trim"})};
  }

  Shape mistral() const {
    Shape shape{.family = ChatFamily::kMistral, .name = "Mistral", .trim = has("trim")};
    const bool space_around = has_any({"' [INST] '", "\" [INST] \""});
    const bool space_behind = space_around || has_any({"'[INST] '", "\"[INST] \""});
    if (!space_behind && !has_any({"'[INST]'", "\"[INST]\""})) refuse("its [INST] is written in its own way");
    shape.open = std::string(space_around ? " " : "") + "[INST]" + (space_behind ? " " : "");
    shape.close = has_any({"' [/INST]'", "\" [/INST]\""}) ? " [/INST]" : "[/INST]";
    if (has_any({"' ' + message['content']", "\" \" + message[\"content\"]"})) shape.before_answer = " ";
    if (has_any({"eos_token + ' '", "eos_token+ ' '", "eos_token + \" \""})) shape.after_answer = " ";
    shape.system = !has("system_message")                      ? Shape::System::kNowhere
                   : has_any({"loop.last and system_message"}) ? Shape::System::kLastUser
                                                               : Shape::System::kFirstUser;
    return shape;
  }

  Shape mistral_v7() const {
    Shape shape{.family = ChatFamily::kMistralV7, .name = "Mistral V7"};
    if (has("default_system_message")) shape.system = Shape::System::kRequired;
    const bool spaces = has_any({"'[INST] '", "\"[INST] \"", "[INST] {{"});
    shape.open = spaces ? "[INST] " : "[INST]";
    shape.close = "[/INST]";
    shape.before_answer = spaces ? " " : "";
    return shape;
  }

  Shape phi3() const {
    allow_markers({"<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>", "<|tool|>", "<|/tool|>"});
    const bool lines = has_any({"<|end|>\\n", "<|end|>\n", "<|end|>' + '\\n"});
    Shape shape{.family = lines ? ChatFamily::kPhi3 : ChatFamily::kPhi4Mini,
                .name = lines ? "Phi-3" : "Phi-4-mini",
                .end_of_turn = "<|end|>",
                .eos_last = has_any({"else %}{{ eos_token }}", "else -%}{{ eos_token }}", "else %}{{- eos_token }}"})};
    if (!has_any({"<|system|>", "'<|' + message"})) shape.system = Shape::System::kNowhere;
    return shape;
  }

  Shape zephyr() const {
    allow_markers({"<|system|>", "<|user|>", "<|assistant|>"});
    if (!has_line("<|user|>")) refuse("it has no line break behind <|user|>");
    return {.family = ChatFamily::kZephyr, .name = "Zephyr"};
  }

  const StoredChat& stored_;
  std::string_view text_;
};

ChatTemplate::ChatTemplate(const StoredChat& stored)
    : shape_(std::make_unique<const Shape>(ChatTemplateReader(stored).read())) {}
ChatTemplate::~ChatTemplate() = default;
ChatTemplate::ChatTemplate(ChatTemplate&&) noexcept = default;
ChatTemplate& ChatTemplate::operator=(ChatTemplate&&) noexcept = default;

const char* ChatTemplate::name() const { return shape_->name; }
const std::string& ChatTemplate::end_of_turn() const { return shape_->end_of_turn; }

}  // namespace baseq
