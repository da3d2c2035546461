#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace baseq {

using Vocab = std::unordered_map<std::string, int32_t>;
using Merges = std::vector<std::pair<std::string, std::string>>;

/// Byte-level byte pair encoding (arXiv 1508.07909 over bytes): the merge of lowest rank first, leftmost among equals.
class Bpe {
 public:
  /// Throws c10::Error when a merge names a token that `vocab` lacks. Tokens are in the byte-level alphabet.
  Bpe(const Vocab& vocab, const Merges& merges);

  struct Symbol {
    int32_t id, previous, next;  // neighbours as indices of symbols, -1 at the ends
    int32_t merged_id;           // of this symbol and the next
    uint32_t rank;               // of that merge; kNoMerge where there is none
  };
  /// Memory that calls of append may share, one per thread.
  struct Workspace {
    std::vector<Symbol> symbols;
    std::vector<uint64_t> queue;
  };

  /// Appends the ids of `piece` in O(n log n). A byte that the vocabulary lacks is dropped, as `tokenizers` does when
  /// there is no unknown token.
  void append(std::string_view piece, Workspace& workspace, std::vector<int32_t>& ids) const;

 private:
  static constexpr uint32_t kNoMerge = 0xFFFFFFFF;
  struct Merge {
    uint64_t pair;  // left id in the high half; kNoPair marks a free slot
    uint32_t rank;
    int32_t id;
  };
  static constexpr uint64_t kNoPair = ~uint64_t{0};

  Merge& slot(uint64_t pair);
  void find_merge(Symbol& left, const Symbol& right) const;

  std::array<int32_t, 256> byte_ids_;
  std::vector<Merge> merges_;  // open addressing, a power of two of slots, at most half of them used
};

}  // namespace baseq
