#pragma once

#include <cstddef>
#include <string_view>

#include "unicode.h"

namespace baseq {

/// End of the piece that starts at `text[begin]` under the pattern of GPT-2,
///   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
/// matched by hand: its alternatives never need more than one character of backtracking. `text` is valid UTF-8.
size_t gpt2_piece_end(std::string_view text, size_t begin, const CharTable& table);

/// Calls `on_piece` with each piece of valid UTF-8 `text`, in order; together they are the text.
/// With `split_digits` every numeric character stands alone and the pattern sees only what lies between them.
template <class Fn>
void for_each_piece(std::string_view text, bool split_digits, Fn&& on_piece) {
  const CharTable& table = CharTable::instance();
  const auto split_by_pattern = [&](std::string_view part) {
    for (size_t begin = 0; begin < part.size();) {
      const size_t end = gpt2_piece_end(part, begin, table);
      on_piece(part.substr(begin, end - begin));
      begin = end;
    }
  };
  if (!split_digits) return split_by_pattern(text);
  size_t begin = 0;
  for (size_t i = 0; i < text.size();) {
    const auto [c, num_bytes] = code_point_at(text, i);
    if (table.is_numeric(c)) {
      split_by_pattern(text.substr(begin, i - begin));
      split_by_pattern(text.substr(i, num_bytes));
      begin = i + num_bytes;
    }
    i += num_bytes;
  }
  split_by_pattern(text.substr(begin));
}

}  // namespace baseq
