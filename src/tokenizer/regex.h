#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "unicode.h"

struct pcre2_real_code_8;
struct pcre2_real_match_data_8;
struct pcre2_real_jit_stack_8;
struct pcre2_real_match_context_8;

namespace baseq {

/// A regular expression that matches what Oniguruma would in the `tokenizers` package, by PCRE2.
/// The two know different versions of Unicode and differ in \s and in folding case. So PCRE2 never sees a code point:
/// all code points that the expression cannot tell apart become one byte, in the expression as in the text, and the
/// classes come from CharTable. That also makes every class a 256-bit table and every code point one step.
class Regex {
 public:
  /// Throws c10::Error that names what is not supported: see parse_regex; also an expression that matches the empty
  /// text.
  explicit Regex(const std::string& pattern);

  /// Memory of calls of for_each_match, one per expression and thread; taken when it is needed. It also counts what the
  /// calls took: their texts pay for it together.
  class Workspace {
    friend class Regex;
    struct Free {
      void operator()(pcre2_real_match_data_8* p) const;
      void operator()(pcre2_real_match_context_8* p) const;
      void operator()(pcre2_real_jit_stack_8* p) const;
    };
    std::unique_ptr<pcre2_real_match_data_8, Free> match_data_;
    std::unique_ptr<pcre2_real_match_context_8, Free> context_;
    std::unique_ptr<pcre2_real_jit_stack_8, Free> stack_;  // where 32 KiB of the machine's do not suffice
    std::vector<uint8_t> symbols_;
    size_t steps_left_ = size_t{1} << 25;  // so many are free: some fifty milliseconds
  };

  /// Calls `on_match(begin, end)` with the bytes of each match in valid UTF-8 `text`, in order; none is empty.
  /// Takes time proportional to the text, whatever the expression: throws c10::Error where that does not suffice.
  template <class Fn>
  void for_each_match(std::string_view text, Workspace& workspace, Fn&& on_match) const;

 private:
  struct Match {
    size_t begin, end;  // in symbols
  };
  void read_symbols(std::string_view text, Workspace& workspace) const;
  std::optional<Match> find(size_t begin, Workspace& workspace) const;
  int match(size_t begin, size_t end, size_t max_steps, bool only_here, Workspace& workspace) const;
  void spend(size_t steps, Workspace& workspace) const;

  std::string pattern_;  // for messages
  std::shared_ptr<const pcre2_real_code_8> code_;
  std::vector<uint8_t> symbol_of_;  // of each code point
};

template <class Fn>
void Regex::for_each_match(std::string_view text, Workspace& workspace, Fn&& on_match) const {
  read_symbols(text, workspace);
  const bool one_byte_each = workspace.symbols_.size() == text.size();
  size_t symbol = 0, byte = 0;
  const auto byte_of = [&](size_t target) {
    if (one_byte_each) return target;
    for (; symbol < target; ++symbol) byte += code_point_at(text, byte).num_bytes;
    return byte;
  };
  size_t searched = 0;
  while (const auto match = find(searched, workspace)) {
    const size_t begin = byte_of(match->begin);
    const size_t end = byte_of(match->end);
    searched = match->end;
    on_match(begin, end);
  }
}

/// What Split and Replace look for: a text or a regular expression.
struct Pattern {
  std::string literal;  // when there is no regex
  std::optional<Regex> regex;

  template <class Fn>
  void for_each_match(std::string_view text, Regex::Workspace& workspace, Fn&& on_match) const {
    if (regex) return regex->for_each_match(text, workspace, on_match);
    for (size_t i = 0; (i = text.find(literal, i)) != std::string_view::npos; i += literal.size()) {
      on_match(i, i + literal.size());
    }
  }
};

/// Throws c10::Error when a text of `original` bytes has become one of `size` by what a tokenizer.json replaces and
/// adds: sixty steps that each double a text would fill any memory. Compatibility forms make 33 bytes of 3.
void check_growth(size_t original, size_t size);

}  // namespace baseq
