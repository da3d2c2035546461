#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace baseq {

struct AddedToken {
  std::string content;
  int32_t id;
  bool lstrip, rstrip;  // the token swallows white space before, after it
  bool normalized;      // searched after the others, in what they left
};

size_t trim_end(std::string_view text);      ///< length of valid UTF-8 `text` without white space at its end
size_t space_length(std::string_view text);  ///< bytes of white space at the start of valid UTF-8 `text`

/// Finds added tokens in text: at the leftmost place, the longest.
class AddedTokenFinder {
 public:
  void add(AddedToken token);

  /// Calls `on_id(id)` for each token found in valid UTF-8 `text` and `on_text(part)` for each part between them.
  template <class OnText, class OnId>
  void split(std::string_view text, OnText&& on_text, OnId&& on_id) const;

 private:
  std::array<std::vector<AddedToken>, 256> by_first_byte_;  // longest first
  std::string first_bytes_;
};

template <class OnText, class OnId>
void AddedTokenFinder::split(std::string_view text, OnText&& on_text, OnId&& on_id) const {
  size_t done = 0;
  size_t i = 0;
  while ((i = text.find_first_of(first_bytes_, i)) != std::string_view::npos) {
    const auto& candidates = by_first_byte_[static_cast<uint8_t>(text[i])];
    const auto token = std::find_if(candidates.begin(), candidates.end(),
                                    [&](const AddedToken& t) { return text.substr(i).starts_with(t.content); });
    if (token == candidates.end()) {
      ++i;
      continue;
    }
    size_t begin = i;
    i += token->content.size();
    size_t end = i;
    if (token->lstrip) begin = std::max(trim_end(text.substr(0, begin)), done);
    if (token->rstrip) end += space_length(text.substr(end));
    if (done < begin) on_text(text.substr(done, begin - done));
    on_id(token->id);
    // The search goes on behind the token, not behind the white space it swallowed: a token may start in there.
    done = end;
  }
  if (done < text.size()) on_text(text.substr(done));
}

}  // namespace baseq
