#define PCRE2_CODE_UNIT_WIDTH 8

#include "regex.h"

#include <c10/util/Exception.h>
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <set>
#include <span>

#include "../io/strict_json.h"
#include "regex_syntax.h"

namespace baseq {
namespace {

using Signature = uint64_t;  // bit i: set i of the expression contains the code point
constexpr size_t kMaxSets = 64;
constexpr size_t kMaxSymbols = 256;
constexpr char32_t kEndOfText = 0x110000;

// A search first sees so many symbols from where it begins, and may go so many steps for each that it sees. Known
// expressions take up to four.
constexpr size_t kFirstWindow = 64;
constexpr size_t kStepsPerSymbol = 16;
// Where that does not suffice, it sees and may go four times as much, and the texts pay: each symbol with so many
// steps. Where all words are longer than the first window, known expressions take up to 86.
constexpr size_t kGrowth = 4;
constexpr size_t kStepsPaidBySymbol = 1024;
// A step of a word that is searched without end takes some 32 bytes of the stack.
constexpr size_t kFirstStackBytes = size_t{1} << 20, kMaxStackBytes = size_t{1} << 27;
constexpr uint32_t kMaxHeapKibibytes = 1 << 17;  // the same of the interpreter

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
  std::set<char32_t> bounds{0, kEndOfText};  // between two of them no range starts or ends
  for (size_t i = 0; i < sets.size(); ++i) {
    for (size_t category = 0; category < of_category.size(); ++category) {
      if (sets[i]->categories >> category & 1) of_category[category] |= Signature{1} << i;
    }
    if (sets[i]->negated) negated |= Signature{1} << i;
    for (const auto& [first, last] : sets[i]->ranges) bounds.insert({first, last + 1});
  }
  std::vector<Signature> signatures;
  std::map<Signature, size_t> symbols;
  symbol_of.resize(kEndOfText);
  for (auto bound = bounds.begin(); *bound != kEndOfText; ++bound) {
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

Regex::Regex(const std::string& pattern) : pattern_(shortened(pattern, 200)) {
  const RegexParts parts = parse_regex(pattern);
  std::vector<const CodePointSet*> sets;
  for (const auto& part : parts) {
    if (const auto* set = std::get_if<CodePointSet>(&part)) sets.push_back(set);
  }
  TORCH_CHECK(sets.size() <= kMaxSets, "regular expression '", pattern_, "' has ", sets.size(),
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
  code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(), PCRE2_USE_OFFSET_LIMIT,
                            &error, &offset, nullptr),
              [](const pcre2_code* code) { pcre2_code_free(const_cast<pcre2_code*>(code)); });
  TORCH_CHECK(code_, "regular expression '", pattern_, "' is not valid: ", error_text(error));
  uint32_t matches_empty = 0;
  pcre2_pattern_info(code_.get(), PCRE2_INFO_MATCHEMPTY, &matches_empty);
  TORCH_CHECK(!matches_empty, "regular expression '", pattern_, "' may match the empty text, which is not supported");
  // Where the machine has no compiler of PCRE2's, the expression is interpreted.
  pcre2_jit_compile(const_cast<pcre2_code*>(code_.get()), PCRE2_JIT_COMPLETE | PCRE2_JIT_PARTIAL_HARD);
}

void Regex::Workspace::Free::operator()(pcre2_match_data* p) const { pcre2_match_data_free(p); }
void Regex::Workspace::Free::operator()(pcre2_match_context* p) const { pcre2_match_context_free(p); }
void Regex::Workspace::Free::operator()(pcre2_jit_stack* p) const { pcre2_jit_stack_free(p); }

void Regex::read_symbols(std::string_view text, Workspace& workspace) const {
  auto& symbols = workspace.symbols_;
  symbols.resize(text.size());
  size_t count = 0;
  for (size_t i = 0; i < text.size();) {
    const auto [c, num_bytes] = code_point_at(text, i);
    symbols[count++] = symbol_of_[c];
    i += num_bytes;
  }
  symbols.resize(count);
  workspace.steps_left_ += count * kStepsPaidBySymbol;
}

void Regex::spend(size_t steps, Workspace& workspace) const {
  TORCH_CHECK(steps <= workspace.steps_left_, "tokenizer: the regular expression '", pattern_,
              "' takes too long: more than ", kStepsPaidBySymbol, " steps for each character of a text of ",
              workspace.symbols_.size());
  workspace.steps_left_ -= steps;
}

// PCRE2's result for a match that starts from `begin` on, or only there, and looks at nothing from `end` on.
int Regex::match(size_t begin, size_t end, size_t max_steps, bool only_here, Workspace& workspace) const {
  if (!workspace.match_data_) {
    workspace.match_data_.reset(pcre2_match_data_create(1, nullptr));
    workspace.context_.reset(pcre2_match_context_create(nullptr));
    TORCH_CHECK(workspace.match_data_ && workspace.context_, "tokenizer: no memory for a regular expression");
    pcre2_set_heap_limit(workspace.context_.get(), kMaxHeapKibibytes);
  }
  constexpr size_t kLargest = std::numeric_limits<uint32_t>::max();
  pcre2_set_match_limit(workspace.context_.get(), static_cast<uint32_t>(std::min(kLargest, max_steps)));
  pcre2_set_offset_limit(workspace.context_.get(), only_here ? begin : PCRE2_UNSET);
  const uint32_t options = end < workspace.symbols_.size() ? PCRE2_PARTIAL_HARD : 0;
  const auto found = [&] {
    return pcre2_match(code_.get(), workspace.symbols_.data(), end, begin, options, workspace.match_data_.get(),
                       workspace.context_.get());
  };
  const int result = found();
  if (result != PCRE2_ERROR_JIT_STACKLIMIT || workspace.stack_) return result;
  workspace.stack_.reset(pcre2_jit_stack_create(kFirstStackBytes, kMaxStackBytes, nullptr));
  TORCH_CHECK(workspace.stack_, "tokenizer: no memory for a regular expression");
  pcre2_jit_stack_assign(workspace.context_.get(), nullptr, workspace.stack_.get());
  return found();
}

// The first match from `begin` on. What a match looks at is limited, and so are its steps: an expression such as
// .+x would look at all of a text from each of its characters.
std::optional<Regex::Match> Regex::find(size_t begin, Workspace& workspace) const {
  const size_t size = workspace.symbols_.size();
  size_t window = kFirstWindow;
  while (begin < size) {
    const bool first = window == kFirstWindow;
    const size_t end = begin + std::min(window, size - begin), max_steps = window * kStepsPerSymbol;
    if (!first) spend(max_steps, workspace);
    const int result = match(begin, end, max_steps, /*only_here=*/!first, workspace);
    const PCRE2_SIZE* ends = pcre2_get_ovector_pointer(workspace.match_data_.get());
    if (result >= 0) return Match{ends[0], ends[1]};
    if (result == PCRE2_ERROR_NOMATCH) {  // nor does a match start in the window, or here
      begin = first ? end : begin + 1;
      window = kFirstWindow;
      continue;
    }
    TORCH_CHECK(result == PCRE2_ERROR_PARTIAL || result == PCRE2_ERROR_MATCHLIMIT,
                "tokenizer: the regular expression '", pattern_, "' failed on a text of ", size,
                " characters: ", error_text(result));
    // From where a match may have started more has to be seen.
    if (result == PCRE2_ERROR_PARTIAL) begin = ends[0];
    window *= kGrowth;
  }
  return std::nullopt;
}

void check_growth(size_t original, size_t size) {
  constexpr size_t kMaxGrowth = 32, kMaxAdded = 256;
  TORCH_CHECK(size <= original * kMaxGrowth + kMaxAdded, "tokenizer: a text of ", original,
              " bytes becomes one of more than ", kMaxGrowth, " times as many and ", kMaxAdded,
              " by what the tokenizer replaces in it");
}

}  // namespace baseq
