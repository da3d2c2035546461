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

// A text and which added tokens each stretch of it may have.
class TextSources {
 public:
  explicit TextSources(std::string_view text) : text_(text), ends_{{text.size(), AddedTokens::kAll}} {}
  explicit TextSources(std::span<const TextPart> parts) {
    for (const TextPart& part : parts) {
      joined_ += part.text;
      if (!part.text.empty()) ends_.push_back({joined_.size(), part.recognized});
    }
    text_ = joined_;
  }
  TextSources(const TextSources&) = delete;
  TextSources& operator=(const TextSources&) = delete;

  std::string_view text() const { return text_; }
  // That of the part that [begin, end) lies in; nothing when it is cut by a border.
  std::optional<AddedTokens> only_source(size_t begin, size_t end) const {
    const auto part = at(begin);
    if (part == ends_.end() || part->end < end) return std::nullopt;
    return part->recognized;
  }
  // fn(begin, end, recognized): cut where parts of kAll begin and end. What a stretch of several others allows is what
  // all of them allow.
  template <class Fn>
  void for_each_stretch(size_t begin, size_t end, Fn&& fn) const {
    const auto is_all = [](const auto& part) { return part->recognized == AddedTokens::kAll; };
    for (auto part = at(begin); begin < end;) {
      AddedTokens recognized = part->recognized;
      while (part->end < end && is_all(std::next(part)) == is_all(part)) {
        recognized = std::max(recognized, (++part)->recognized);
      }
      const size_t stop = std::min(end, part->end);
      fn(begin, stop, recognized);
      begin = stop;
      ++part;
    }
  }

 private:
  struct Part {
    size_t end = 0;
    AddedTokens recognized = AddedTokens::kAll;
  };
  std::vector<Part>::const_iterator at(size_t offset) const {
    return std::ranges::upper_bound(ends_, offset, {}, &Part::end);
  }
  std::string joined_;
  std::string_view text_;
  std::vector<Part> ends_;
};

void check_utf8(std::string_view text) {
  const size_t invalid = find_invalid_utf8(text);
  TORCH_CHECK(invalid == std::string_view::npos, "tokenizer: text is not valid UTF-8 at byte ", invalid);
}

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
      added_ids.emplace(token.content, token.id);
      if (token.normalized) {
        const std::string content = normalize(normalizer, token.content).text;
        TORCH_CHECK(!content.empty(), "nothing is left of the added token '", token.content, "' after the normalizer");
        normalized_added_tokens.add(token, content);
      } else {
        added_tokens.add(token, token.content);
      }
    }
  }

  bool allows(AddedTokens recognized, int32_t id) const {
    return recognized == AddedTokens::kAll || (recognized == AddedTokens::kNotSpecial && !special_ids.contains(id));
  }

  std::vector<std::string> tokens_of(std::span<const int32_t> ids, bool skip_special_tokens) const {
    std::vector<std::string> result;
    result.reserve(ids.size());
    for (size_t i = 0; i < ids.size(); ++i) {
      const auto found = tokens.find(ids[i]);
      TORCH_CHECK(found != tokens.end(), "tokenizer: id ", ids[i], " at position ", i,
                  " stands for no token of the vocabulary of ", tokens.size());
      if (!skip_special_tokens || !special_ids.contains(ids[i])) result.push_back(found->second);
    }
    return result;
  }

  void encode(const TextSources& sources, std::vector<int32_t>& ids) const {
    const std::string_view text = sources.text();
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
    const auto add_stretch = [&](size_t begin, size_t end, AddedTokens recognized) {
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
      const auto allowed = [&](int32_t id, size_t, size_t) { return allows(recognized, id); };
      normalized_added_tokens.split(part, add_text, add_id, allowed);
    };
    const auto add_part = [&](size_t begin, size_t end) { sources.for_each_stretch(begin, end, add_stretch); };
    added_tokens.split(text, add_part, add_id, [&](int32_t id, size_t begin, size_t end) {
      const auto source = sources.only_source(begin, end);
      return source && allows(*source, id);
    });
  }

  AddedTokenFinder added_tokens, normalized_added_tokens;
  std::vector<Normalizer> normalizer;
  std::vector<PreTokenizer> pre_tokenizer;
  Bpe bpe;
  PostProcessing post_processor;
  std::vector<Decoder> decoder;
  std::unordered_map<int32_t, std::string> tokens;
  std::unordered_set<int32_t> special_ids;
  std::unordered_map<std::string, int32_t> added_ids;
};

Tokenizer::Tokenizer(const std::filesystem::path& tokenizer_json)
    : Tokenizer(read_json("tokenizer", tokenizer_json, DuplicateKeys::kLastWins), tokenizer_json.string()) {}
Tokenizer::Tokenizer(const nlohmann::json& tokenizer_json, const std::string& name)
    : impl_(naming_file(name, [&] { return std::make_unique<Impl>(read_tokenizer_json(tokenizer_json)); })) {}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
  check_utf8(text);
  std::vector<int32_t> ids;
  const auto& [before, after] = impl_->post_processor;
  if (add_special_tokens) ids.insert(ids.end(), before.begin(), before.end());
  impl_->encode(TextSources(text), ids);
  if (add_special_tokens) ids.insert(ids.end(), after.begin(), after.end());
  return ids;
}

std::vector<int32_t> Tokenizer::encode(std::span<const TextPart> parts) const {
  for (const TextPart& part : parts) check_utf8(part.text);
  std::vector<int32_t> ids;
  impl_->encode(TextSources(parts), ids);
  return ids;
}

std::optional<int32_t> Tokenizer::added_token(std::string_view content) const {
  const auto found = impl_->added_ids.find(std::string(content));
  return found == impl_->added_ids.end() ? std::nullopt : std::optional(found->second);
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special_tokens) const {
  return baseq::decode(impl_->decoder, impl_->tokens_of(ids, skip_special_tokens));
}

Tokenizer::PartialText Tokenizer::decode_partial(std::span<const int32_t> ids, bool skip_special_tokens) const {
  std::vector<std::string> tokens = impl_->tokens_of(ids, skip_special_tokens);
  PartialText result{.text = baseq::decode(impl_->decoder, tokens)};
  result.settled = settled_bytes(impl_->decoder, std::move(tokens), result.text);
  return result;
}

bool Tokenizer::has_token(int32_t id) const { return impl_->tokens.contains(id); }

int64_t Tokenizer::vocab_size() const { return static_cast<int64_t>(impl_->tokens.size()); }

}  // namespace baseq
