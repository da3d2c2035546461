#define PCRE2_CODE_UNIT_WIDTH 8

#include "regex.h"

#include <c10/util/Exception.h>
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <map>
#include <set>
#include <span>

#include "regex_syntax.h"

namespace baseq {
namespace {

using Signature = uint64_t;  // bit i: set i of the expression contains the code point
constexpr size_t kMaxSets = 64;
constexpr size_t kMaxSymbols = 256;
constexpr char32_t kEnd = 0x110000;

std::string error_text(int code) {
  std::array<PCRE2_UCHAR, 128> text{};
  pcre2_get_error_message(code, text.data(), text.size());
  return reinterpret_cast<const char*>(text.data());
}

// The set as a class of the symbols whose signatures have its bit.
std::string symbol_class(size_t set, std::span<const Signature> signatures) {
  std::string result;
  for (size_t symbol = 0; symbol < signatures.size(); ++symbol) {
    if (!(signatures[symbol] >> set & 1)) continue;
    constexpr std::string_view kDigits = "0123456789abcdef";
    result += {'\\', 'x', kDigits[symbol >> 4], kDigits[symbol & 15]};
  }
  return result.empty() ? "(?!)" : "[" + result + "]";
}

// Gives each code point the symbol of its signature and returns the signatures of the symbols.
std::vector<Signature> assign_symbols(const std::vector<const CodePointSet*>& sets, std::vector<uint8_t>& symbol_of) {
  const CharTable& table = CharTable::instance();
  std::array<Signature, 30> of_category{};
  Signature negated = 0;
  std::set<char32_t> bounds{0, kEnd};  // between two of them no range starts or ends
  for (size_t i = 0; i < sets.size(); ++i) {
    for (size_t category = 0; category < of_category.size(); ++category) {
      if (sets[i]->categories >> category & 1) of_category[category] |= Signature{1} << i;
    }
    if (sets[i]->negated) negated |= Signature{1} << i;
    for (const auto& [first, last] : sets[i]->ranges) bounds.insert({first, last + 1});
  }
  std::vector<Signature> signatures;
  std::map<Signature, size_t> symbols;
  symbol_of.resize(kEnd);
  for (auto bound = bounds.begin(); *bound != kEnd; ++bound) {
    Signature in_ranges = 0;
    for (size_t i = 0; i < sets.size(); ++i) {
      const auto holds = [&](const auto& range) { return range.first <= *bound && *bound <= range.second; };
      if (std::ranges::any_of(sets[i]->ranges, holds)) in_ranges |= Signature{1} << i;
    }
    std::array<int, 30> symbol_of_category;
    symbol_of_category.fill(-1);
    for (char32_t c = *bound; c < *std::next(bound); ++c) {
      const auto category = static_cast<size_t>(table.category(c));
      if (symbol_of_category[category] < 0) {
        const Signature signature = (in_ranges | of_category[category]) ^ negated;
        const auto [entry, is_new] = symbols.emplace(signature, signatures.size());
        if (is_new) signatures.push_back(signature);
        TORCH_CHECK(signatures.size() <= kMaxSymbols, "it tells more than ", kMaxSymbols, " kinds of characters apart");
        symbol_of_category[category] = static_cast<int>(entry->second);
      }
      symbol_of[c] = static_cast<uint8_t>(symbol_of_category[category]);
    }
  }
  return signatures;
}

}  // namespace

Regex::Regex(const std::string& pattern) {
  const RegexParts parts = parse_regex(pattern);
  std::vector<const CodePointSet*> sets;
  for (const auto& part : parts) {
    if (const auto* set = std::get_if<CodePointSet>(&part)) sets.push_back(set);
  }
  TORCH_CHECK(sets.size() <= kMaxSets, "regular expression '", pattern, "' has ", sets.size(),
              " characters and classes, at most ", kMaxSets, " are supported");
  const std::vector<Signature> signatures = assign_symbols(sets, symbol_of_);
  std::string translated;
  size_t set = 0;
  for (const auto& part : parts) {
    const auto* op = std::get_if<std::string>(&part);
    translated += op ? *op : symbol_class(set++, signatures);
  }

  int error = 0;
  PCRE2_SIZE offset = 0;
  code_.reset(
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(), 0, &error, &offset, nullptr),
      [](const pcre2_code* code) { pcre2_code_free(const_cast<pcre2_code*>(code)); });
  TORCH_CHECK(code_, "regular expression '", pattern, "' is not valid: ", error_text(error));
  uint32_t matches_empty = 0;
  pcre2_pattern_info(code_.get(), PCRE2_INFO_MATCHEMPTY, &matches_empty);
  TORCH_CHECK(!matches_empty, "regular expression '", pattern, "' may match the empty text, which is not supported");
  // Where the machine has no compiler of PCRE2's, the expression is interpreted.
  pcre2_jit_compile(const_cast<pcre2_code*>(code_.get()), PCRE2_JIT_COMPLETE);
}

void Regex::Workspace::Free::operator()(pcre2_match_data* p) const { pcre2_match_data_free(p); }
void Regex::Workspace::Free::operator()(pcre2_match_context* p) const { pcre2_match_context_free(p); }
void Regex::Workspace::Free::operator()(pcre2_jit_stack* p) const { pcre2_jit_stack_free(p); }

void Regex::read_symbols(std::string_view text, std::vector<uint8_t>& symbols) const {
  symbols.resize(text.size());
  size_t count = 0;
  for (size_t i = 0; i < text.size();) {
    const auto [c, num_bytes] = code_point_at(text, i);
    symbols[count++] = symbol_of_[c];
    i += num_bytes;
  }
  symbols.resize(count);
}

std::optional<Regex::Match> Regex::find(size_t begin, Workspace& workspace) const {
  const auto match = [&] {
    return pcre2_match(code_.get(), workspace.symbols_.data(), workspace.symbols_.size(), begin, 0,
                       workspace.match_data_.get(), workspace.context_.get());
  };
  if (!workspace.match_data_) workspace.match_data_.reset(pcre2_match_data_create(1, nullptr));
  TORCH_CHECK(workspace.match_data_, "tokenizer: no memory for a regular expression");
  int found = match();
  if (found == PCRE2_ERROR_JIT_STACKLIMIT && !workspace.stack_) {
    workspace.context_.reset(pcre2_match_context_create(nullptr));
    workspace.stack_.reset(pcre2_jit_stack_create(size_t{1} << 20, size_t{1} << 30, nullptr));
    TORCH_CHECK(workspace.context_ && workspace.stack_, "tokenizer: no memory for a regular expression");
    pcre2_jit_stack_assign(workspace.context_.get(), nullptr, workspace.stack_.get());
    found = match();
  }
  if (found == PCRE2_ERROR_NOMATCH) return std::nullopt;
  TORCH_CHECK(found >= 0, "tokenizer: a regular expression failed on a text of ", workspace.symbols_.size(),
              " characters: ", error_text(found));
  const PCRE2_SIZE* ends = pcre2_get_ovector_pointer(workspace.match_data_.get());
  return Match{ends[0], ends[1]};
}

}  // namespace baseq
