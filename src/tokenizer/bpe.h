#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace baseq {

using Vocab = std::unordered_map<std::string, int32_t>;
using Merges = std::vector<std::pair<std::string, std::string>>;

/// The model of a tokenizer.json, by its names there.
struct BpeOptions {
  bool byte_level = false;               // tokens are in the byte-level alphabet, pieces are bytes
  std::optional<std::string> unk_token;  // stands for what has no token; without it that is dropped
  bool fuse_unk = false;                 // one for neighbours
  bool byte_fallback = false;            // before unk_token, <0x00> to <0xFF> for the bytes of the character
  bool ignore_merges = false;            // a piece that is a token is that token, whatever the merges
};

/// Byte pair encoding (arXiv 1508.07909): the merge of lowest rank first, leftmost among equals. It starts from the
/// characters of a piece, or from its bytes.
class Bpe {
 public:
  /// Throws c10::Error when a merge names a token that `vocab` lacks.
  Bpe(const Vocab& vocab, const Merges& merges, const BpeOptions& options);

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

  /// Appends the ids of `piece`, not empty, in O(n log n). Throws c10::Error when it needs an unk_token that the
  /// vocabulary lacks.
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
  void read_units(std::string_view piece, std::vector<Symbol>& symbols) const;
  void find_merge(Symbol& left, const Symbol& right) const;

  BpeOptions options_;
  bool drops_unknown_;  // it has no fallback and no unknown token
  int32_t unk_id_ = -1;
  std::array<int32_t, 256> byte_ids_;             // of byte-level characters; -1 where there is none, as below
  std::vector<int32_t> char_ids_;                 // of code points
  std::array<int32_t, 256> fallback_ids_;         // of <0x00> to <0xFF>
  std::unordered_map<std::string, int32_t> ids_;  // of whole pieces, for ignore_merges
  std::vector<Merge> merges_;                     // open addressing, a power of two of slots, at most half of them used
};

}  // namespace baseq
