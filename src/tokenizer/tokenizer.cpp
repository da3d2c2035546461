#include "baseq/tokenizer/tokenizer.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <bit>
#include <deque>
#include <functional>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "../io/strict_json.h"
#include "added_tokens.h"
#include "bpe.h"
#include "decoder.h"
#include "normalizer.h"
#include "pre_tokenizer.h"
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
auto naming_file(const std::string& name, Fn&& fn) {
  try {
    return fn();
  } catch (const c10::Error& error) {
    TORCH_CHECK(false, "tokenizer: ", name, ": ", error.what_without_backtrace());
  }
}

}  // namespace

struct Tokenizer::Impl {
  explicit Impl(TokenizerJson file)
      : normalizer(std::move(file.normalizer)),
        pre_tokenizer(std::move(file.pre_tokenizer)),
        bpe(file.vocab, file.merges, file.model),
        post_processor(std::move(file.post_processor)),
        decoder(std::move(file.decoder)) {
    for (auto& [token, id] : file.vocab) tokens.emplace(id, token);
    // Where normalization makes two contents equal, the special token counts.
    std::ranges::stable_partition(file.added_tokens, &AddedToken::special);
    for (const AddedToken& token : file.added_tokens) {
      tokens.emplace(token.id, token.content);
      if (token.special) special_ids.insert(token.id);
      if (token.normalized) {
        const std::string content = normalize(normalizer, token.content).text;
        TORCH_CHECK(!content.empty(), "nothing is left of the added token '", token.content, "' after the normalizer");
        normalized_added_tokens.add(token, content);
      } else {
        added_tokens.add(token, token.content);
      }
    }
  }

  void encode(std::string_view text, std::vector<int32_t>& ids) const {
    ids.reserve(ids.size() + text.size() / 3);
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
    PreTokenization pre_tokenization(pre_tokenizer, add_word);
    std::deque<std::string> normalized;  // the cache has views of them
    const auto add_id = [&](int32_t id) { ids.push_back(id); };
    const auto add_part = [&](size_t begin, size_t end) {
      std::string_view part = text.substr(begin, end - begin);
      size_t first_size = 1;
      if (!normalizer.empty()) {
        NormalizedText result = normalize(normalizer, part);
        part = normalized.emplace_back(std::move(result.text));
        first_size = result.first_size;
      }
      const auto add_text = [&](size_t from, size_t to) {
        pre_tokenization.run(part.substr(from, to - from), begin == 0 && from < first_size);
      };
      normalized_added_tokens.split(part, add_text, add_id);
    };
    added_tokens.split(text, add_part, add_id);
  }

  AddedTokenFinder added_tokens, normalized_added_tokens;
  std::vector<Normalizer> normalizer;
  std::vector<PreTokenizer> pre_tokenizer;
  Bpe bpe;
  PostProcessing post_processor;
  std::vector<Decoder> decoder;
  std::unordered_map<int32_t, std::string> tokens;
  std::unordered_set<int32_t> special_ids;
};

Tokenizer::Tokenizer(const std::filesystem::path& tokenizer_json)
    : Tokenizer(read_json("tokenizer", tokenizer_json, DuplicateKeys::kLastWins), tokenizer_json.string()) {}
Tokenizer::Tokenizer(const nlohmann::json& tokenizer_json, const std::string& name)
    : impl_(naming_file(name, [&] { return std::make_unique<Impl>(read_tokenizer_json(tokenizer_json)); })) {}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
  const size_t invalid = find_invalid_utf8(text);
  TORCH_CHECK(invalid == std::string_view::npos, "tokenizer: text is not valid UTF-8 at byte ", invalid);
  std::vector<int32_t> ids;
  const auto& [before, after] = impl_->post_processor;
  if (add_special_tokens) ids.insert(ids.end(), before.begin(), before.end());
  impl_->encode(text, ids);
  if (add_special_tokens) ids.insert(ids.end(), after.begin(), after.end());
  return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special_tokens) const {
  std::vector<std::string> tokens;
  tokens.reserve(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) {
    const auto found = impl_->tokens.find(ids[i]);
    TORCH_CHECK(found != impl_->tokens.end(), "tokenizer: id ", ids[i], " at position ", i,
                " stands for no token of the vocabulary of ", vocab_size());
    if (!skip_special_tokens || !impl_->special_ids.contains(ids[i])) tokens.push_back(found->second);
  }
  return baseq::decode(impl_->decoder, std::move(tokens));
}

int64_t Tokenizer::vocab_size() const { return static_cast<int64_t>(impl_->tokens.size()); }

}  // namespace baseq
