#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#pragma GCC visibility push(default)
namespace baseq {

/// The added tokens of a vocabulary that are recognized in a text, each fewer than the one before.
enum class AddedTokens {
  kAll,
  kNotSpecial,  ///< not those that steer a model, such as <|im_end|>
  kNone,        ///< such a token's text is text
};

/// A stretch of a text from one source: what a template writes, what a user wrote.
struct TextPart {
  std::string text{};
  AddedTokens recognized = AddedTokens::kAll;
};

/// A Hugging Face tokenizer.json with a BPE model: ids and texts identical to those of the `tokenizers` package 0.22.
/// Normalizers NFC, NFD, NFKC, NFKD, Prepend, Replace, Lowercase, Strip; pre-tokenizers Split, Digits, Metaspace,
/// ByteLevel (as the last); post-processors TemplateProcessing, ByteLevel; decoders ByteLevel, ByteFallback, Fuse,
/// Strip, Replace, Metaspace; and a Sequence of any. All but decoding takes O(n log n), whatever the text. Const calls
/// may run in several threads at once.
class Tokenizer {
 public:
  /// Throws c10::Error that names the file and each component (normalizer, pre-tokenizer, model, post-processor) and
  /// option that is not supported, or the first value that is malformed.
  explicit Tokenizer(const std::filesystem::path& tokenizer_json);
  /// The same of what such a file holds; `name` is what messages call it.
  Tokenizer(const nlohmann::json& tokenizer_json, const std::string& name);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;

  /// Token ids of UTF-8 `text`, special tokens of the post-processor included when `add_special_tokens`.
  /// A character that has no token, no bytes to fall back to and no unk_token is dropped, as the package does. Added
  /// tokens are recognized in `text`.
  /// Throws c10::Error with the byte offset of invalid UTF-8.
  std::vector<int32_t> encode(std::string_view text, bool add_special_tokens = true) const;
  /// Ids of the text that `parts` make together, without special tokens of the post-processor:
  ///   encode({{"<|im_start|>"}, {"user\n" + text, AddedTokens::kNone}, {"<|im_end|>"}})
  /// An added token is recognized where it lies within one part that allows it. Parts of kAll should be nothing but
  /// such tokens: other text of theirs is tokenized apart from its neighbours.
  std::vector<int32_t> encode(std::span<const TextPart> parts) const;
  /// The id of the added token `content`.
  std::optional<int32_t> added_token(std::string_view content) const;
  /// The text that `ids` stand for, with U+FFFD where ids cut a character. Throws c10::Error for an id that has no
  /// token, which the package skips.
  std::string decode(std::span<const int32_t> ids, bool skip_special_tokens = false) const;
  /// The text so far of ids that others will follow.
  struct PartialText {
    std::string text{};  ///< decode(ids)
    size_t settled = 0;  ///< its first bytes, which stay whatever follows; the end of a character
  };
  PartialText decode_partial(std::span<const int32_t> ids, bool skip_special_tokens = false) const;
  /// Whether an id stands for a token; models may have more rows than their tokenizer has tokens.
  bool has_token(int32_t id) const;
  int64_t vocab_size() const;  ///< added tokens included

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace baseq
#pragma GCC visibility pop
