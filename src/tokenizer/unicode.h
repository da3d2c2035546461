#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace baseq {

/// What the GPT-2 pattern distinguishes: \p{L}, \p{N}, \s and the rest. Every code point has exactly one of them.
enum class CharClass : uint8_t { kOther, kLetter, kNumber, kSpace };

/// Properties of all code points, built once from utf8proc (Unicode 15.0) and newer_code_points.h: what `tokenizers`
/// 0.22 takes them for, whose regular expressions and pre-tokenizers know Unicode 16 and 17.
class CharTable {
 public:
  static const CharTable& instance();

  CharClass char_class(char32_t c) const { return static_cast<CharClass>(entries_[c] & kClassMask); }
  bool is_space(char32_t c) const { return char_class(c) == CharClass::kSpace; }  ///< White_Space
  /// Rust's char::is_numeric, which the Digits pre-tokenizer uses.
  bool is_numeric(char32_t c) const { return (entries_[c] & kNumeric) != 0; }
  /// General category, a utf8proc_category_t from 0 (Cn) to 29 (Co).
  int category(char32_t c) const { return entries_[c] >> kCategoryShift; }
  /// \w of Rust's regular expressions, which single_word tokens use.
  bool is_word(char32_t c) const;

 private:
  CharTable();
  static constexpr uint8_t kClassMask = 3;
  static constexpr uint8_t kNumeric = 4;
  static constexpr int kCategoryShift = 3;
  uint8_t entries_[0x110000];
};

/// Simple lower case of `c`; U+0130, the one code point that becomes two, is the caller's.
char32_t lowercase(char32_t c);
/// Whether the normalization forms of `tokenizers`, older than utf8proc's, leave `c` as it is.
bool is_unknown_to_normalization(char32_t c);

struct CodePoint {
  char32_t value;
  size_t num_bytes;
};

/// The code point that starts at `text[offset]`; `text` must be valid UTF-8.
inline CodePoint code_point_at(std::string_view text, size_t offset) {
  const auto byte = [&](size_t i) { return static_cast<char32_t>(static_cast<uint8_t>(text[offset + i])); };
  const char32_t first = byte(0);
  if (first < 0x80) return {first, 1};
  if (first < 0xE0) return {(first & 0x1F) << 6 | (byte(1) & 0x3F), 2};
  if (first < 0xF0) return {(first & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F), 3};
  return {(first & 0x07) << 18 | (byte(1) & 0x3F) << 12 | (byte(2) & 0x3F) << 6 | (byte(3) & 0x3F), 4};
}

/// The code point before `text[end]`, end > 0; `text` must be valid UTF-8.
inline CodePoint code_point_before(std::string_view text, size_t end) {
  size_t begin = end - 1;
  while ((static_cast<uint8_t>(text[begin]) & 0xC0) == 0x80) --begin;
  return code_point_at(text, begin);
}

void append_utf8(char32_t c, std::string& text);

/// Offset of the first byte that starts no valid UTF-8 sequence, or npos.
size_t find_invalid_utf8(std::string_view text);

/// `bytes` with U+FFFD in place of each longest part that starts a UTF-8 sequence but is none.
std::string replace_invalid_utf8(std::string_view bytes);

/// The byte-level alphabet of GPT-2: the UTF-8 character that stands for `byte` in a vocabulary.
std::string byte_to_char(uint8_t byte);

/// Whether every character of `token` is in that alphabet.
bool is_byte_level(const std::string& token);

/// The bytes that `token` stands for. A token with a character outside the alphabet stands for itself.
std::string token_to_bytes(const std::string& token);

}  // namespace baseq
