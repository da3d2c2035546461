#include "unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>

#include "newer_code_points.h"

namespace baseq {
namespace {

CharClass class_of(char32_t c, int category) {
  switch (category) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
      return CharClass::kLetter;
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_NO:
      return CharClass::kNumber;
    case UTF8PROC_CATEGORY_ZS:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
      return CharClass::kSpace;
    default:  // White_Space is the separators and these six control characters
      return (c >= 0x09 && c <= 0x0D) || c == 0x85 ? CharClass::kSpace : CharClass::kOther;
  }
}

// Length of the sequence at the start of `bytes` if it is valid, else minus the length of what to replace: the longest
// start of a valid sequence, or one byte.
int sequence_length(std::string_view bytes) {
  const auto byte = [&](size_t i) { return i < bytes.size() ? static_cast<uint8_t>(bytes[i]) : uint8_t{0}; };
  const uint8_t first = byte(0);
  if (first < 0x80) return 1;
  if (first < 0xC2 || first > 0xF4) return -1;
  const int length = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
  // The second byte excludes overlong sequences, surrogates and what lies beyond U+10FFFF.
  const uint8_t low = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
  const uint8_t high = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
  if (byte(1) < low || byte(1) > high) return -1;
  for (int i = 2; i < length; ++i) {
    if ((byte(static_cast<size_t>(i)) & 0xC0) != 0x80) return -i;
  }
  return length;
}

// Bytes that are printable Latin-1 characters stand for themselves; the others take U+0100 onwards in turn.
const std::array<char32_t, 256>& byte_alphabet() {
  static const std::array<char32_t, 256> alphabet = [] {
    std::array<char32_t, 256> chars;
    char32_t next = 0x100;
    for (char32_t b = 0; b < 256; ++b) {
      const bool printable = (b > 0x20 && b < 0x7F) || (b > 0xA0 && b != 0xAD);
      chars[b] = printable ? b : next++;
    }
    return chars;
  }();
  return alphabet;
}

// -1 for a character outside the byte-level alphabet.
int char_to_byte(char32_t c) {
  static const std::array<int16_t, 0x144> bytes = [] {
    std::array<int16_t, 0x144> inverse;
    inverse.fill(-1);
    for (int16_t b = 0; b < 256; ++b) inverse[byte_alphabet()[static_cast<size_t>(b)]] = b;
    return inverse;
  }();
  return c < bytes.size() ? bytes[c] : -1;
}

}  // namespace

CharTable::CharTable() {
  const auto set = [&](char32_t c, int category) {
    const CharClass value = class_of(c, category);
    entries_[c] = static_cast<uint8_t>(static_cast<uint8_t>(value) | (value == CharClass::kNumber ? kNumeric : 0) |
                                       category << kCategoryShift);
  };
  for (char32_t c = 0; c < 0x110000; ++c) set(c, utf8proc_category(static_cast<utf8proc_int32_t>(c)));
  for (const CategoryRange& range : kNewerCategories) {
    for (char32_t c = range.first; c <= range.last; ++c) set(c, range.category);
  }
  for (const CodePointRange& range : kNewerDigits) {
    for (char32_t c = range.first; c <= range.last; ++c) entries_[c] |= kNumeric;
  }
}

bool CharTable::is_word(char32_t c) const {
  switch (category(c)) {
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    case UTF8PROC_CATEGORY_SO:  // letters in circles and squares are Alphabetic
      return (c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) || (c >= 0x1F150 && c <= 0x1F169) ||
             (c >= 0x1F170 && c <= 0x1F189);
    default:
      return char_class(c) == CharClass::kLetter || c == 0x200C || c == 0x200D;
  }
}

const CharTable& CharTable::instance() {
  static const std::unique_ptr<const CharTable> table(new CharTable);
  return *table;
}

char32_t lowercase(char32_t c) {
  if (c < 0x80) return c >= 'A' && c <= 'Z' ? c + 0x20 : c;
  const auto newer = std::lower_bound(std::begin(kNewerLowercases), std::end(kNewerLowercases), c,
                                      [](const Lowercase& entry, char32_t value) { return entry.from < value; });
  if (newer != std::end(kNewerLowercases) && newer->from == c) return newer->to;
  return static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(c)));
}

bool is_unknown_to_normalization(char32_t c) {
  const auto range = std::lower_bound(std::begin(kUnknownToNormalization), std::end(kUnknownToNormalization), c,
                                      [](const CodePointRange& entry, char32_t value) { return entry.last < value; });
  return range != std::end(kUnknownToNormalization) && range->first <= c;
}

void append_utf8(char32_t c, std::string& text) {
  std::array<utf8proc_uint8_t, 4> bytes;
  const auto num_bytes = utf8proc_encode_char(static_cast<utf8proc_int32_t>(c), bytes.data());
  text.append(reinterpret_cast<const char*>(bytes.data()), static_cast<size_t>(num_bytes));
}

size_t find_invalid_utf8(std::string_view text) {
  const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
  size_t i = 0;
  while (i < text.size()) {
    uint64_t eight;
    while (i + sizeof(eight) <= text.size()) {
      std::memcpy(&eight, bytes + i, sizeof(eight));
      if (eight & 0x8080808080808080) break;
      i += sizeof(eight);
    }
    if (i == text.size()) break;
    if (bytes[i] < 0x80) {
      ++i;
      continue;
    }
    utf8proc_int32_t c;
    const auto num_bytes = utf8proc_iterate(bytes + i, static_cast<utf8proc_ssize_t>(text.size() - i), &c);
    if (num_bytes <= 0) return i;
    i += static_cast<size_t>(num_bytes);
  }
  return std::string_view::npos;
}

std::string replace_invalid_utf8(std::string_view bytes) {
  if (find_invalid_utf8(bytes) == std::string_view::npos) return std::string(bytes);
  std::string text;
  for (size_t i = 0; i < bytes.size();) {
    const int length = sequence_length(bytes.substr(i));
    if (length > 0) {
      text += bytes.substr(i, static_cast<size_t>(length));
    } else {
      text += "\uFFFD";
    }
    i += static_cast<size_t>(std::abs(length));
  }
  return text;
}

std::string byte_to_char(uint8_t byte) {
  const char32_t c = byte_alphabet()[byte];
  if (c < 0x80) return {static_cast<char>(c)};
  return {static_cast<char>(0xC0 | c >> 6), static_cast<char>(0x80 | (c & 0x3F))};
}

bool is_byte_level(const std::string& token) {
  for (size_t i = 0; i < token.size();) {
    const auto [c, num_bytes] = code_point_at(token, i);
    if (char_to_byte(c) < 0) return false;
    i += num_bytes;
  }
  return true;
}

std::string token_to_bytes(const std::string& token) {
  if (!is_byte_level(token)) return token;
  std::string result;
  for (size_t i = 0; i < token.size();) {
    const auto [c, num_bytes] = code_point_at(token, i);
    result.push_back(static_cast<char>(char_to_byte(c)));
    i += num_bytes;
  }
  return result;
}

}  // namespace baseq
