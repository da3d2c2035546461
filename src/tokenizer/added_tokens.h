#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace baseq {

struct AddedToken {
  std::string content;
  int32_t id;
  bool single_word;     // not beside a word character
  bool lstrip, rstrip;  // the token swallows white space before, after it
  bool normalized;      // its normalized content is searched after the others, in what they left, normalized
  bool special;         // decoding may leave it out
};

/// Finds added tokens in text: at the leftmost place, the longest.
class AddedTokenFinder {
 public:
  AddedTokenFinder();
  /// Looks for `content`, not empty, where `token` is meant; of equal contents the first counts.
  void add(const AddedToken& token, std::string_view content);

  /// Calls `on_id(id)` for each token found in valid UTF-8 `text` and `on_text(begin, end)` with the bytes between
  /// them. Tokens count where `allowed(id, begin, end)`.
  template <class OnText, class OnId, class Allowed>
  void split(std::string_view text, OnText&& on_text, OnId&& on_id, Allowed&& allowed) const;

 private:
  struct Found {
    const AddedToken* token;
    size_t end;
  };
  // Looks at `begin`; token is null when none starts there.
  Found find_at(std::string_view text, size_t begin) const;
  static bool stands_alone(std::string_view text, size_t begin, size_t end);
  static size_t trim_end(std::string_view text);      // length without white space at its end
  static size_t space_length(std::string_view text);  // bytes of white space at its start

  // A node of the tree of contents: the bytes that may follow and the nodes behind them.
  struct Node {
    std::vector<std::pair<uint8_t, uint32_t>> next;
    int32_t token = -1;
  };
  std::vector<Node> nodes_;
  std::vector<AddedToken> tokens_;
  std::vector<bool> starts_;  // of each byte: whether a content starts with it
};

template <class OnText, class OnId, class Allowed>
void AddedTokenFinder::split(std::string_view text, OnText&& on_text, OnId&& on_id, Allowed&& allowed) const {
  size_t done = 0;
  size_t space_end = 0;  // of white space that was looked through last
  for (size_t i = 0; i < text.size();) {
    if (!starts_[static_cast<uint8_t>(text[i])]) {
      ++i;
      continue;
    }
    const auto [token, token_end] = find_at(text, i);
    if (token == nullptr || !allowed(token->id, i, token_end)) {
      ++i;
      continue;
    }
    size_t begin = i;
    // The search goes on behind the token, not behind the white space it swallowed: a token may start in there.
    i = token_end;
    if (token->single_word && !stands_alone(text, begin, token_end)) continue;
    if (token->lstrip) begin = begin > done ? done + trim_end(text.substr(done, begin - done)) : done;
    if (token->rstrip && space_end <= token_end) space_end = token_end + space_length(text.substr(token_end));
    const size_t end = token->rstrip ? space_end : token_end;
    if (done < begin) on_text(done, begin);
    if (begin < end) on_id(token->id);  // nothing is left where the token before swallowed this one
    done = end;
  }
  if (done < text.size()) on_text(done, text.size());
}

}  // namespace baseq
