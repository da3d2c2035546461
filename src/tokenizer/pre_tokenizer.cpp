#include "pre_tokenizer.h"

#include <algorithm>

namespace baseq {
namespace {

struct Run {
  size_t end;         // of the characters of one class
  size_t last_begin;  // where the last of them starts
};

Run find_run(std::string_view text, size_t begin, CharClass char_class, const CharTable& table) {
  Run run{begin, begin};
  while (run.end < text.size()) {
    const auto [c, num_bytes] = code_point_at(text, run.end);
    if (table.char_class(c) != char_class) break;
    run = {run.end + num_bytes, run.end};
  }
  return run;
}

// Length of 's 't 're 've 'm 'll 'd at the start of `text`, or 0.
size_t contraction_length(std::string_view text) {
  if (text.size() < 2) return 0;
  switch (text[1]) {
    case 's':
    case 't':
    case 'm':
    case 'd':
      return 2;
    case 'r':
    case 'v':
      return text.size() > 2 && text[2] == 'e' ? 3 : 0;
    case 'l':
      return text.size() > 2 && text[2] == 'l' ? 3 : 0;
    default:
      return 0;
  }
}

}  // namespace

size_t gpt2_piece_end(std::string_view text, size_t begin, const CharTable& table) {
  if (text[begin] == '\'') {
    if (const size_t length = contraction_length(text.substr(begin))) return begin + length;
  }
  CharClass char_class = table.char_class(code_point_at(text, begin).value);
  size_t word = begin;
  if (text[begin] == ' ' && begin + 1 < text.size()) {
    const CharClass next = table.char_class(code_point_at(text, begin + 1).value);
    if (next != CharClass::kSpace) {
      char_class = next;
      word = begin + 1;
    }
  }
  const Run run = find_run(text, word, char_class, table);
  // \s+(?!\S) gives the last space of several back to what follows it.
  const bool gives_back = char_class == CharClass::kSpace && run.end < text.size() && run.last_begin > begin;
  return gives_back ? run.last_begin : run.end;
}

std::string apply_metaspace(const pre_tokenizers::Metaspace& step, std::string_view text, bool starts_original) {
  using PrependScheme = pre_tokenizers::Metaspace::PrependScheme;
  std::string result;
  result.reserve(text.size() + text.size() / 2 + step.replacement.size());
  const bool prepends = step.prepend_scheme == PrependScheme::kAlways ||
                        (step.prepend_scheme == PrependScheme::kFirst && starts_original);
  if (prepends && text[0] != ' ' && !text.starts_with(step.replacement)) result += step.replacement;
  for (size_t begin = 0; begin < text.size();) {
    const size_t space = std::min(text.find(' ', begin), text.size());
    result += text.substr(begin, space - begin);
    if (space < text.size()) result += step.replacement;
    begin = space + 1;
  }
  return result;
}

}  // namespace baseq
