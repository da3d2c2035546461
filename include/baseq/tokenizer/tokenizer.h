#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace baseq {

/// A Hugging Face tokenizer.json with a byte-level BPE model: ids identical to the `tokenizers` package.
/// Const calls may run in several threads at once.
class Tokenizer {
 public:
  /// Throws c10::Error that names the file and each component (normalizer, pre-tokenizer, model, post-processor) and
  /// option that is not supported, or the first value that is malformed.
  explicit Tokenizer(const std::filesystem::path& tokenizer_json);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;

  /// Token ids of UTF-8 `text`, special tokens of the post-processor included when `add_special_tokens`.
  /// A byte that has no token in the vocabulary is dropped, as the package does. Added tokens are recognized in `text`.
  /// Throws c10::Error with the byte offset of invalid UTF-8.
  std::vector<int32_t> encode(std::string_view text, bool add_special_tokens = true) const;
  /// The bytes that `ids` stand for, special tokens included; they are invalid UTF-8 where ids cut a character.
  /// Throws c10::Error for an id that has no token.
  std::string decode(std::span<const int32_t> ids) const;
  int64_t vocab_size() const;  ///< added tokens included

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace baseq
