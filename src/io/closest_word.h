#pragma once

#include <algorithm>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

namespace baseq {

/// The Levenshtein distance of two words: the number of letters to insert, remove or replace.
inline size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = std::exchange(row[0], i);
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = std::exchange(row[j], std::min({row[j] + 1, row[j - 1] + 1, replaced}));
    }
  }
  return row.back();
}

/// The word of `known` that `word` probably misspells; the longest common beginning decides between equally distant
/// ones. Else the first word that begins with `word`. Empty if there is none.
inline std::string closest_word(const std::string& word, const std::vector<std::string>& known) {
  std::string closest;
  size_t smallest = word.size() / 3 + 1, longest_beginning = word.size();
  for (const std::string& candidate : known) {
    const size_t distance = edit_distance(word, candidate);
    const auto beginning = static_cast<size_t>(std::ranges::mismatch(word, candidate).in1 - word.begin());
    if (distance < smallest || (distance == smallest && beginning > longest_beginning)) {
      smallest = distance;
      longest_beginning = beginning;
      closest = candidate;
    }
  }
  constexpr size_t kShortestBeginning = 3;
  if (!closest.empty() || word.size() < kShortestBeginning) return closest;
  const auto longer = std::ranges::find_if(known, [&](const std::string& name) { return name.starts_with(word); });
  return longer == known.end() ? "" : *longer;
}

}  // namespace baseq
