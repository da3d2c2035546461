#include "added_tokens.h"

#include <utility>

#include "unicode.h"

namespace baseq {
namespace {

bool is_space(char32_t c) { return CharTable::instance().char_class(c) == CharClass::kSpace; }

}  // namespace

size_t trim_end(std::string_view text) {
  size_t end = text.size();
  while (end > 0) {
    size_t begin = end - 1;
    while ((static_cast<uint8_t>(text[begin]) & 0xC0) == 0x80) --begin;
    if (!is_space(code_point_at(text, begin).value)) break;
    end = begin;
  }
  return end;
}

size_t space_length(std::string_view text) {
  size_t length = 0;
  while (length < text.size()) {
    const auto [c, num_bytes] = code_point_at(text, length);
    if (!is_space(c)) break;
    length += num_bytes;
  }
  return length;
}

void AddedTokenFinder::add(AddedToken token) {
  const char first = token.content.front();
  if (first_bytes_.find(first) == std::string::npos) first_bytes_.push_back(first);
  auto& tokens = by_first_byte_[static_cast<uint8_t>(first)];
  const auto shorter = std::find_if(tokens.begin(), tokens.end(),
                                    [&](const AddedToken& t) { return t.content.size() < token.content.size(); });
  tokens.insert(shorter, std::move(token));
}

}  // namespace baseq
