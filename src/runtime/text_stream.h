#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "baseq/tokenizer/tokenizer.h"

namespace baseq {

/// The text of tokens as they come. Every piece is valid UTF-8; all pieces together are Tokenizer::decode of all
/// tokens, special ones and ids without a token left out. What a later token may change is held back.
class TextStream {
 public:
  /// @param tokenizer must outlive this stream
  explicit TextStream(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
  std::string push(int32_t id);
  std::string finish();  ///< what was held back

 private:
  const Tokenizer& tokenizer_;
  // The last tokens: those before fresh_ are there because a decoder may treat the first token of a text in a way of
  // its own.
  std::vector<int32_t> window_;
  size_t fresh_ = 0;
  size_t given_ = 0;  // bytes of the window's text
};

/// Finds the first of several texts in a text that comes in pieces.
class StopStrings {
 public:
  /// Throws c10::Error for one that is empty.
  explicit StopStrings(std::vector<std::string> stops);
  /// Returns what no longer can be part of a stop string; after one was found, nothing. Of several the one that ends
  /// first counts: how the text is cut into pieces makes no difference.
  std::string push(std::string_view text);
  std::string finish();  ///< what was held back
  bool found() const { return found_; }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool found_ = false;
};

}  // namespace baseq
