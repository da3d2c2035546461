#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace baseq {

/// What the GPT-2 pattern distinguishes: \p{L}, \p{N}, \s and the rest. Every code point has exactly one of them.
enum class CharClass : uint8_t { kOther, kLetter, kNumber, kSpace };

/// Classes of all code points, built once from utf8proc.
/// Code points that Unicode assigned after 15.0 follow what `tokenizers` 0.22 does (newer_code_points.h).
class CharTable {
 public:
  static const CharTable& instance();

  CharClass char_class(char32_t c) const { return static_cast<CharClass>(entries_[c] & kClassMask); }
  /// Rust's char::is_numeric, which the Digits pre-tokenizer uses.
  bool is_numeric(char32_t c) const { return (entries_[c] & kNumeric) != 0; }

 private:
  CharTable();
  static constexpr uint8_t kClassMask = 3;
  static constexpr uint8_t kNumeric = 4;
  uint8_t entries_[0x110000];
};

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

/// Offset of the first byte that starts no valid UTF-8 sequence, or npos.
size_t find_invalid_utf8(std::string_view text);

/// The byte-level alphabet of GPT-2: the UTF-8 character that stands for `byte` in a vocabulary.
std::string byte_to_char(uint8_t byte);

/// The bytes that `token` stands for. A token with a character outside the alphabet stands for itself.
std::string token_to_bytes(const std::string& token);

}  // namespace baseq
