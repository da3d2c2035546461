#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace baseq {

/// A set of code points: those of some general categories and ranges, or all others.
struct CodePointSet {
  uint32_t categories = 0;  // bit i: utf8proc category i
  std::vector<std::pair<char32_t, char32_t>> ranges;
  bool negated = false;

  void add(char32_t c) { ranges.emplace_back(c, c); }
  void add(const CodePointSet& other);  // which must not be negated
};

/// A regular expression as a sequence of sets, each matching one code point, and of operators between them, written
/// as PCRE2 and Oniguruma both read them.
using RegexParts = std::vector<std::variant<CodePointSet, std::string>>;

/// Reads `pattern`, valid UTF-8 in Oniguruma's syntax, as the `tokenizers` package would. Throws c10::Error that names
/// the first construct that it does not read or that the two engines understand differently.
RegexParts parse_regex(const std::string& pattern);

}  // namespace baseq
