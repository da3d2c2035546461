#include "baseq/tokenizer/tokenizer.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <bit>
#include <functional>
#include <unordered_map>
#include <utility>

#include "added_tokens.h"
#include "bpe.h"
#include "pretokenize.h"
#include "tokenizer_json.h"
#include "unicode.h"

namespace baseq {
namespace {

// Words of one text whose ids are known: they stand in the output already, so an entry only says where.
// Direct-mapped; a new word replaces the old one of its slot.
class WordCache {
 public:
  explicit WordCache(size_t text_size) : entries_(std::bit_ceil(std::clamp<size_t>(text_size / 8, 8, 1 << 15))) {}

  struct Entry {
    std::string_view word;  // in the text
    size_t first_id = 0;
    size_t num_ids = 0;
  };
  Entry& slot(std::string_view word) { return entries_[std::hash<std::string_view>()(word) & (entries_.size() - 1)]; }

 private:
  std::vector<Entry> entries_;
};

// A message that starts with the file, whichever part of the reading failed.
template <class Fn>
auto naming_file(const std::filesystem::path& path, Fn&& fn) {
  try {
    return fn();
  } catch (const c10::Error& error) {
    TORCH_CHECK(false, "tokenizer: ", path.string(), ": ", error.what_without_backtrace());
  }
}

}  // namespace

struct Tokenizer::Impl {
  explicit Impl(const TokenizerJson& file) : bpe(file.vocab, file.merges), split_digits(file.split_digits) {
    for (const auto& [token, id] : file.vocab) token_bytes.emplace(id, token_to_bytes(token));
    for (const AddedToken& token : file.added_tokens) {
      token_bytes.emplace(token.id, token_to_bytes(token.content));
      (token.normalized ? normalized_added_tokens : added_tokens).add(token);
    }
  }

  std::vector<int32_t> encode(std::string_view text) const {
    std::vector<int32_t> ids;
    ids.reserve(text.size() / 3);
    WordCache cache(text.size());
    Bpe::Workspace workspace;
    const auto add_word = [&](std::string_view word) {
      WordCache::Entry& entry = cache.slot(word);
      if (entry.word != word) {
        entry = {word, ids.size(), 0};
        bpe.append(word, workspace, ids);
        entry.num_ids = ids.size() - entry.first_id;
        return;
      }
      for (size_t i = 0; i < entry.num_ids; ++i) {
        const int32_t id = ids[entry.first_id + i];
        ids.push_back(id);
      }
    };
    const auto add_text = [&](std::string_view part) { for_each_piece(part, split_digits, add_word); };
    const auto add_id = [&](int32_t id) { ids.push_back(id); };
    added_tokens.split(
        text, [&](std::string_view part) { normalized_added_tokens.split(part, add_text, add_id); }, add_id);
    return ids;
  }

  AddedTokenFinder added_tokens, normalized_added_tokens;
  Bpe bpe;
  bool split_digits;
  std::unordered_map<int32_t, std::string> token_bytes;
};

Tokenizer::Tokenizer(const std::filesystem::path& tokenizer_json)
    : impl_(naming_file(tokenizer_json, [&] { return std::make_unique<Impl>(read_tokenizer_json(tokenizer_json)); })) {}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

// No supported post-processor adds special tokens yet.
std::vector<int32_t> Tokenizer::encode(std::string_view text, bool /*add_special_tokens*/) const {
  const size_t invalid = find_invalid_utf8(text);
  TORCH_CHECK(invalid == std::string_view::npos, "tokenizer: text is not valid UTF-8 at byte ", invalid);
  return impl_->encode(text);
}

std::string Tokenizer::decode(std::span<const int32_t> ids) const {
  std::string text;
  for (size_t i = 0; i < ids.size(); ++i) {
    const auto found = impl_->token_bytes.find(ids[i]);
    TORCH_CHECK(found != impl_->token_bytes.end(), "tokenizer: id ", ids[i], " at position ", i,
                " stands for no token of the vocabulary of ", vocab_size());
    text += found->second;
  }
  return text;
}

int64_t Tokenizer::vocab_size() const { return static_cast<int64_t>(impl_->token_bytes.size()); }

}  // namespace baseq
