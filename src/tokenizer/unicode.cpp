#include "unicode.h"

#include <utf8proc.h>

#include <array>
#include <cstring>
#include <memory>

#include "newer_code_points.h"

namespace baseq {
namespace {

CharClass library_class(char32_t c) {
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
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

}  // namespace

CharTable::CharTable() {
  for (char32_t c = 0; c < 0x110000; ++c) {
    const CharClass value = library_class(c);
    entries_[c] = static_cast<uint8_t>(value) | (value == CharClass::kNumber ? kNumeric : 0);
  }
  const auto set = [&](const auto& ranges, uint8_t mask, uint8_t value) {
    for (const CodePointRange& range : ranges) {
      for (char32_t c = range.first; c <= range.last; ++c) entries_[c] = (entries_[c] & ~mask) | value;
    }
  };
  set(kNewerLetters, kClassMask, static_cast<uint8_t>(CharClass::kLetter));
  set(kNewerNumbers, kClassMask, static_cast<uint8_t>(CharClass::kNumber));
  set(kNewerDigits, kNumeric, kNumeric);
}

const CharTable& CharTable::instance() {
  static const std::unique_ptr<const CharTable> table(new CharTable);
  return *table;
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

std::string byte_to_char(uint8_t byte) {
  const char32_t c = byte_alphabet()[byte];
  if (c < 0x80) return {static_cast<char>(c)};
  return {static_cast<char>(0xC0 | c >> 6), static_cast<char>(0x80 | (c & 0x3F))};
}

std::string token_to_bytes(const std::string& token) {
  static const std::array<int16_t, 0x144> bytes = [] {
    std::array<int16_t, 0x144> inverse;
    inverse.fill(-1);
    for (int16_t b = 0; b < 256; ++b) inverse[byte_alphabet()[static_cast<size_t>(b)]] = b;
    return inverse;
  }();
  std::string result;
  for (size_t i = 0; i < token.size();) {
    const auto [c, num_bytes] = code_point_at(token, i);
    if (c >= bytes.size() || bytes[c] < 0) return token;
    result.push_back(static_cast<char>(bytes[c]));
    i += num_bytes;
  }
  return result;
}

}  // namespace baseq
