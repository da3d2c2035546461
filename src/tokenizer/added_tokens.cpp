#include "added_tokens.h"

#include <c10/util/Exception.h>

#include <algorithm>

#include "unicode.h"

namespace baseq {

AddedTokenFinder::AddedTokenFinder() : nodes_(1), starts_(256, false) {}

void AddedTokenFinder::add(const AddedToken& token, std::string_view content) {
  TORCH_INTERNAL_ASSERT(!content.empty());
  starts_[static_cast<uint8_t>(content[0])] = true;
  size_t node = 0;
  for (const char c : content) {
    const auto byte = static_cast<uint8_t>(c);
    const auto known = std::ranges::find(nodes_[node].next, byte, [](const auto& edge) { return edge.first; });
    if (known != nodes_[node].next.end()) {
      node = known->second;
    } else {
      nodes_[node].next.emplace_back(byte, static_cast<uint32_t>(nodes_.size()));
      node = nodes_.size();
      nodes_.emplace_back();
    }
  }
  if (nodes_[node].token >= 0) return;
  nodes_[node].token = static_cast<int32_t>(tokens_.size());
  tokens_.push_back(token);
}

AddedTokenFinder::Found AddedTokenFinder::find_at(std::string_view text, size_t begin) const {
  Found found{nullptr, begin};
  size_t node = 0;
  for (size_t i = begin; i < text.size(); ++i) {
    const auto& next = nodes_[node].next;
    const auto byte = static_cast<uint8_t>(text[i]);
    const auto edge = std::ranges::find(next, byte, [](const auto& e) { return e.first; });
    if (edge == next.end()) break;
    node = edge->second;
    if (const int32_t token = nodes_[node].token; token >= 0) found = {&tokens_[static_cast<size_t>(token)], i + 1};
  }
  return found;
}

bool AddedTokenFinder::stands_alone(std::string_view text, size_t begin, size_t end) {
  const CharTable& table = CharTable::instance();
  return (begin == 0 || !table.is_word(code_point_before(text, begin).value)) &&
         (end == text.size() || !table.is_word(code_point_at(text, end).value));
}

size_t AddedTokenFinder::trim_end(std::string_view text) {
  const CharTable& table = CharTable::instance();
  size_t end = text.size();
  while (end > 0) {
    const auto [c, num_bytes] = code_point_before(text, end);
    if (!table.is_space(c)) break;
    end -= num_bytes;
  }
  return end;
}

size_t AddedTokenFinder::space_length(std::string_view text) {
  const CharTable& table = CharTable::instance();
  size_t length = 0;
  while (length < text.size()) {
    const auto [c, num_bytes] = code_point_at(text, length);
    if (!table.is_space(c)) break;
    length += num_bytes;
  }
  return length;
}

}  // namespace baseq
