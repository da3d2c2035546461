#include "bpe.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <bit>
#include <functional>
#include <limits>
#include <utility>

#include "unicode.h"

namespace baseq {
namespace {

uint64_t pair_key(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

size_t hash(uint64_t key) {
  key *= 0x9E3779B97F4A7C15;
  return key ^ key >> 32;
}

}  // namespace

Bpe::Bpe(const Vocab& vocab, const Merges& merges, const BpeOptions& options)
    : options_(options),
      drops_unknown_(!options.unk_token && !options.byte_fallback),
      merges_(std::bit_ceil(2 * merges.size() + 2), {kNoPair, 0, 0}) {
  const auto id_or_none = [&](const std::string& token) {
    const auto found = vocab.find(token);
    return found == vocab.end() ? -1 : found->second;
  };
  if (options.unk_token) unk_id_ = id_or_none(*options.unk_token);
  for (size_t byte = 0; byte < byte_ids_.size(); ++byte) {
    byte_ids_[byte] = id_or_none(byte_to_char(static_cast<uint8_t>(byte)));
    constexpr std::string_view kDigits = "0123456789ABCDEF";
    fallback_ids_[byte] = id_or_none({'<', '0', 'x', kDigits[byte >> 4], kDigits[byte & 15], '>'});
  }
  for (const auto& [token, id] : vocab) {
    if (token.empty()) continue;
    if (const auto [c, num_bytes] = code_point_at(token, 0); num_bytes == token.size()) {
      if (c >= char_ids_.size()) char_ids_.resize(c + 1, -1);
      char_ids_[c] = id;
    }
    if (!options.ignore_merges) continue;
    if (!options.byte_level) {
      ids_.emplace(token, id);
    } else if (is_byte_level(token)) {
      ids_.emplace(token_to_bytes(token), id);
    }
  }
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const auto& [left, right] = merges[rank];
    const auto id = [&](const std::string& token) {
      const auto found = vocab.find(token);
      TORCH_CHECK(found != vocab.end(), "tokenizer: merge ", rank, " ('", left, "', '", right, "') needs the token '",
                  token, "', which the vocabulary lacks");
      return found->second;
    };
    const uint64_t pair = pair_key(id(left), id(right));
    slot(pair) = {pair, static_cast<uint32_t>(rank), id(left + right)};  // of equal merges the last counts
  }
}

Bpe::Merge& Bpe::slot(uint64_t pair) {
  const size_t mask = merges_.size() - 1;
  size_t i = hash(pair) & mask;
  while (merges_[i].pair != pair && merges_[i].pair != kNoPair) i = (i + 1) & mask;
  return merges_[i];
}

void Bpe::find_merge(Symbol& left, const Symbol& right) const {
  const uint64_t pair = pair_key(left.id, right.id);
  const size_t mask = merges_.size() - 1;
  size_t i = hash(pair) & mask;
  while (merges_[i].pair != pair && merges_[i].pair != kNoPair) i = (i + 1) & mask;
  left.rank = merges_[i].pair == pair ? merges_[i].rank : kNoMerge;
  left.merged_id = merges_[i].id;
}

void Bpe::read_units(std::string_view piece, std::vector<Symbol>& symbols) const {
  const auto push = [&](int32_t id) {
    const auto index = static_cast<int32_t>(symbols.size());
    symbols.push_back({id, index - 1, index + 1, 0, kNoMerge});
  };
  if (options_.byte_level && drops_unknown_) {
    for (const char c : piece) {
      if (const int32_t id = byte_ids_[static_cast<uint8_t>(c)]; id >= 0) push(id);
    }
    return;
  }
  // An unknown token waits for the next character that has a token, past characters that fall back to bytes.
  bool unknown_waits = false;
  const auto push_known = [&](int32_t id) {
    if (std::exchange(unknown_waits, false)) push(unk_id_);
    push(id);
  };
  const auto push_unknown = [&](std::string_view character) {
    const auto fallback_id = [&](char c) { return fallback_ids_[static_cast<uint8_t>(c)]; };
    if (options_.byte_fallback && std::ranges::all_of(character, [&](char c) { return fallback_id(c) >= 0; })) {
      for (const char c : character) push(fallback_id(c));
      return;
    }
    if (!options_.unk_token) return;
    TORCH_CHECK(unk_id_ >= 0, "tokenizer: the text needs model.unk_token '", *options_.unk_token,
                "', which the vocabulary lacks");
    if (unknown_waits && !options_.fuse_unk) push(unk_id_);
    unknown_waits = true;
  };
  for (size_t i = 0; i < piece.size();) {
    if (options_.byte_level) {
      const auto byte = static_cast<uint8_t>(piece[i++]);
      if (byte_ids_[byte] >= 0) {
        push_known(byte_ids_[byte]);
      } else {
        push_unknown(byte_to_char(byte));
      }
      continue;
    }
    const auto [c, num_bytes] = code_point_at(piece, i);
    if (c < char_ids_.size() && char_ids_[c] >= 0) {
      push_known(char_ids_[c]);
    } else {
      push_unknown(piece.substr(i, num_bytes));
    }
    i += num_bytes;
  }
  if (unknown_waits) push(unk_id_);
}

void Bpe::append(std::string_view piece, Workspace& workspace, std::vector<int32_t>& ids) const {
  TORCH_CHECK(piece.size() < std::numeric_limits<int32_t>::max(), "tokenizer: a word has ", piece.size(),
              " bytes, at most 2^31 - 2 are supported");
  if (options_.ignore_merges) {
    if (const auto found = ids_.find(std::string(piece)); found != ids_.end()) return ids.push_back(found->second);
  }
  auto& symbols = workspace.symbols;
  auto& queue = workspace.queue;  // min-heap of rank and symbol; an entry whose symbol has another rank now is stale
  symbols.clear();
  queue.clear();
  read_units(piece, symbols);
  if (symbols.empty()) return;
  symbols.back().next = -1;

  const auto entry = [&](int32_t index) {
    return static_cast<uint64_t>(symbols[static_cast<size_t>(index)].rank) << 32 | static_cast<uint32_t>(index);
  };
  for (size_t i = 0; i + 1 < symbols.size(); ++i) {
    find_merge(symbols[i], symbols[i + 1]);
    if (symbols[i].rank != kNoMerge) queue.push_back(entry(static_cast<int32_t>(i)));
  }
  std::make_heap(queue.begin(), queue.end(), std::greater<>());

  const auto refresh = [&](int32_t index) {
    Symbol& symbol = symbols[static_cast<size_t>(index)];
    symbol.rank = kNoMerge;
    if (symbol.next < 0) return;
    find_merge(symbol, symbols[static_cast<size_t>(symbol.next)]);
    if (symbol.rank == kNoMerge) return;
    queue.push_back(entry(index));
    std::push_heap(queue.begin(), queue.end(), std::greater<>());
  };
  while (!queue.empty()) {
    std::pop_heap(queue.begin(), queue.end(), std::greater<>());
    const uint64_t top = queue.back();
    queue.pop_back();
    const auto index = static_cast<int32_t>(top & 0xFFFFFFFF);
    Symbol& left = symbols[static_cast<size_t>(index)];
    if (left.rank != top >> 32) continue;
    Symbol& right = symbols[static_cast<size_t>(left.next)];
    left.id = left.merged_id;
    left.next = right.next;
    right.rank = kNoMerge;  // makes its queue entry stale
    if (left.next >= 0) symbols[static_cast<size_t>(left.next)].previous = index;
    refresh(index);
    if (left.previous >= 0) refresh(left.previous);
  }
  for (int32_t i = 0; i >= 0; i = symbols[static_cast<size_t>(i)].next)
    ids.push_back(symbols[static_cast<size_t>(i)].id);
}

}  // namespace baseq
