#pragma once

#include <algorithm>
#include <cstddef>
#include <deque>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "regex.h"
#include "unicode.h"

namespace baseq {

/// Steps of the pre_tokenizer of a tokenizer.json, by their names there.
namespace pre_tokenizers {

struct Digits {
  bool individual_digits;
};
/// Its bytes stay bytes here: Bpe looks them up as such.
struct ByteLevel {
  bool add_prefix_space, use_regex;
};
struct Metaspace {
  enum class PrependScheme { kFirst, kAlways, kNever };
  std::string replacement;
  PrependScheme prepend_scheme;
  bool split;
};
struct Split {
  enum class Behavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };
  Pattern pattern;
  Behavior behavior;
  bool invert;
};

}  // namespace pre_tokenizers

using PreTokenizer =
    std::variant<pre_tokenizers::Digits, pre_tokenizers::ByteLevel, pre_tokenizers::Metaspace, pre_tokenizers::Split>;

/// End of the piece that starts at `text[begin]` under the pattern of GPT-2,
///   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
/// matched without an engine for speed: its alternatives never need more than one character of backtracking. `text` is
/// valid UTF-8.
size_t gpt2_piece_end(std::string_view text, size_t begin, const CharTable& table);

/// `text` as Metaspace leaves it before splitting: spaces replaced, the replacement prepended where the scheme says.
std::string apply_metaspace(const pre_tokenizers::Metaspace& step, std::string_view text, bool starts_original);

/// Runs texts through all steps of a pre-tokenizer and calls `on_piece(std::string_view)` with each piece, in order.
/// A piece is a view of the text or of a string that this object keeps.
template <class OnPiece>
class PreTokenization {
 public:
  PreTokenization(const std::vector<PreTokenizer>& steps, OnPiece on_piece)
      : steps_(steps), on_piece_(std::move(on_piece)), workspaces_(steps.size()) {}

  /// @param starts_original whether valid UTF-8 `text` begins where the original text began
  void run(std::string_view text, bool starts_original) { run(text, starts_original, 0); }

 private:
  void run(std::string_view text, bool starts_original, size_t step) {
    if (text.empty()) return;
    if (step == steps_.size()) return on_piece_(text);
    std::visit([&](const auto& s) { apply(s, text, starts_original, step); }, steps_[step]);
  }

  void apply(const pre_tokenizers::Digits& digits, std::string_view text, bool starts_original, size_t step);
  void apply(const pre_tokenizers::ByteLevel& byte_level, std::string_view text, bool starts_original, size_t step);
  void apply(const pre_tokenizers::Metaspace& metaspace, std::string_view text, bool starts_original, size_t step);
  void apply(const pre_tokenizers::Split& split, std::string_view text, bool starts_original, size_t step);

  const std::vector<PreTokenizer>& steps_;
  OnPiece on_piece_;
  std::vector<Regex::Workspace> workspaces_;  // of each step
  std::deque<std::string> strings_;
};

template <class OnPiece>
void PreTokenization<OnPiece>::apply(const pre_tokenizers::Digits& digits, std::string_view text, bool starts_original,
                                     size_t step) {
  const CharTable& table = CharTable::instance();
  const auto pass_on = [&](size_t begin, size_t end) {
    if (begin < end) run(text.substr(begin, end - begin), starts_original && begin == 0, step + 1);
  };
  size_t begin = 0;
  bool in_number = false;
  for (size_t i = 0; i < text.size();) {
    const auto [c, num_bytes] = code_point_at(text, i);
    const bool numeric = table.is_numeric(c);
    if (numeric != in_number || (numeric && digits.individual_digits)) {
      pass_on(begin, i);
      begin = i;
      in_number = numeric;
    }
    i += num_bytes;
  }
  pass_on(begin, text.size());
}

template <class OnPiece>
void PreTokenization<OnPiece>::apply(const pre_tokenizers::ByteLevel& byte_level, std::string_view text,
                                     bool /*starts_original*/, size_t /*step*/) {
  // It is the last step: the reader of the file makes sure.
  if (byte_level.add_prefix_space && text[0] != ' ') text = strings_.emplace_back(" " + std::string(text));
  if (!byte_level.use_regex) return on_piece_(text);
  const CharTable& table = CharTable::instance();
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = gpt2_piece_end(text, begin, table);
    on_piece_(text.substr(begin, end - begin));
    begin = end;
  }
}

template <class OnPiece>
void PreTokenization<OnPiece>::apply(const pre_tokenizers::Metaspace& metaspace, std::string_view text,
                                     bool starts_original, size_t step) {
  text = strings_.emplace_back(apply_metaspace(metaspace, text, starts_original));
  if (!metaspace.split) return run(text, starts_original, step + 1);
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(metaspace.replacement, begin + 1), text.size());
    run(text.substr(begin, end - begin), starts_original && begin == 0, step + 1);
    begin = end;
  }
}

template <class OnPiece>
void PreTokenization<OnPiece>::apply(const pre_tokenizers::Split& split, std::string_view text, bool starts_original,
                                     size_t step) {
  using Behavior = pre_tokenizers::Split::Behavior;
  size_t begin = 0, end = 0;  // of the piece that may still grow
  bool is_match = false;      // whether its last part matched
  const auto pass_on = [&] {
    if (begin < end) run(text.substr(begin, end - begin), starts_original && begin == 0, step + 1);
    begin = end;
  };
  const auto add_part = [&](size_t part_end, bool part_is_match) {
    if (part_end == end) return;
    bool joins = false;
    switch (split.behavior) {
      case Behavior::kRemoved:
        if (part_is_match) {
          pass_on();
          begin = end = part_end;
          return;
        }
        break;
      case Behavior::kIsolated:
        break;
      case Behavior::kMergedWithPrevious:
        joins = part_is_match && !is_match;
        break;
      case Behavior::kMergedWithNext:
        joins = is_match && !part_is_match;
        break;
      case Behavior::kContiguous:
        joins = part_is_match == is_match;
        break;
    }
    if (!joins) pass_on();
    end = part_end;
    is_match = part_is_match;
  };
  split.pattern.for_each_match(text, workspaces_[step], [&](size_t match_begin, size_t match_end) {
    add_part(match_begin, split.invert);
    add_part(match_end, !split.invert);
  });
  add_part(text.size(), split.invert);
  pass_on();
}

}  // namespace baseq
