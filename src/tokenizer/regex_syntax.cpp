#include "regex_syntax.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <string_view>

#include "../io/strict_json.h"
#include "unicode.h"

namespace baseq {
namespace {

constexpr char32_t kLastCodePoint = 0x10FFFF;
constexpr uint32_t kAllCategories = (uint32_t{1} << 30) - 1;
// In the order of utf8proc_category_t.
constexpr std::string_view kCategoryNames[] = {"Cn", "Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd",
                                               "Nl", "No", "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sm",
                                               "Sc", "Sk", "So", "Zs", "Zl", "Zp", "Cc", "Cf", "Cs", "Co"};

// Categories whose name starts with `name`: "L" or "Lu"; 0 when there is none.
uint32_t categories_named(std::string_view name) {
  uint32_t mask = 0;
  if (name.empty()) return mask;
  for (size_t i = 0; i < std::size(kCategoryNames); ++i) {
    if (kCategoryNames[i].starts_with(name)) mask |= uint32_t{1} << i;
  }
  return mask;
}

CodePointSet white_space() {
  return {.ranges = {{0x09, 0x0D},
                     {0x20, 0x20},
                     {0x85, 0x85},
                     {0xA0, 0xA0},
                     {0x1680, 0x1680},
                     {0x2000, 0x200A},
                     {0x2028, 0x2029},
                     {0x202F, 0x202F},
                     {0x205F, 0x205F},
                     {0x3000, 0x3000}}};
}

// The same code points without `negated`; the set has categories or sorted ranges, not both.
CodePointSet complement(const CodePointSet& set) {
  if (set.ranges.empty()) return {.categories = ~set.categories & kAllCategories};
  CodePointSet result;
  char32_t next = 0;
  for (const auto& [first, last] : set.ranges) {
    if (first > next) result.ranges.emplace_back(next, first - 1);
    next = last + 1;
  }
  if (next <= kLastCodePoint) result.ranges.emplace_back(next, kLastCodePoint);
  return result;
}

bool is_letter(char32_t c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
bool is_digit(char32_t c) { return c >= '0' && c <= '9'; }

class Parser {
 public:
  explicit Parser(const std::string& pattern) : pattern_(pattern) {
    for (size_t i = 0; i < pattern.size();) {
      const auto [c, num_bytes] = code_point_at(pattern, i);
      chars_.push_back(c);
      offsets_.push_back(i);
      i += num_bytes;
    }
    offsets_.push_back(pattern.size());
  }

  RegexParts parse() {
    while (!done()) parse_one();
    require(groups_.empty(), chars_.size(), "a group that is not closed");
    return std::move(parts_);
  }

 private:
  bool done() const { return position_ == chars_.size(); }
  bool at(std::u32string_view text) const { return std::u32string_view(chars_).substr(position_).starts_with(text); }
  bool accept(std::u32string_view text) {
    if (!at(text)) return false;
    position_ += text.size();
    return true;
  }
  std::string text(size_t begin, size_t end) const {
    return pattern_.substr(offsets_[begin], offsets_[std::min(end, chars_.size())] - offsets_[begin]);
  }
  void require(bool supported, size_t begin, const char* what) const {
    TORCH_CHECK(supported, "regular expression '", shortened(pattern_, 200), "': ", what, " at '",
                text(std::min(begin, chars_.size()), begin + 8), "' is not supported");
  }

  void add_operator(const std::string& op) {
    parts_.emplace_back(op);
    previous_folded_ = 0;
  }
  void add_set(CodePointSet set) {
    parts_.emplace_back(std::move(set));
    previous_folded_ = 0;
  }
  void add_literal(char32_t c, size_t begin) {
    CodePointSet set;
    set.add(c);
    if (!ignore_case_) return add_set(std::move(set));
    require(c < 0x80, begin, "a character other than ASCII without regard to case");
    if (!is_letter(c)) return add_set(std::move(set));
    const char32_t lower = c | 0x20;
    // Oniguruma lets a pair such as ss match one character that folds to it.
    const bool one_folds_to_pair = (previous_folded_ == 's' && (lower == 's' || lower == 't')) ||
                                   (previous_folded_ == 'f' && (lower == 'f' || lower == 'i' || lower == 'l'));
    require(!one_folds_to_pair, begin, "a pair of letters that is the case folding of one character");
    set.ranges = {{lower, lower}, {lower - 0x20, lower - 0x20}};
    if (lower == 's') set.add(0x17F);
    if (lower == 'k') set.add(0x212A);
    add_set(std::move(set));
    previous_folded_ = lower;
  }

  void parse_one() {
    const size_t begin = position_;
    const char32_t c = chars_[position_];
    if (c == U'(') return parse_group();
    ++position_;
    switch (c) {
      case U')':
        require(!groups_.empty(), begin, "a parenthesis that closes no group");
        ignore_case_ = groups_.back();
        groups_.pop_back();
        return add_operator(")");
      case U'|':
        return add_operator("|");
      case U'*':
      case U'+':
      case U'?':
        return parse_suffix(std::string(1, static_cast<char>(c)));
      case U'{':
        return parse_interval(begin);
      case U'[':
        require(!ignore_case_, begin, "a class without regard to case");
        return add_set(parse_class(begin));
      case U'.':
        return add_set({.ranges = {{'\n', '\n'}}, .negated = true});
      case U'^':
      case U'$':
        require(false, begin, "an anchor");
        return;
      case U'\\':
        return parse_escape(begin);
      default:
        return add_literal(c, begin);
    }
  }

  void parse_group() {
    const size_t begin = position_;
    groups_.push_back(ignore_case_);
    for (const auto& [written, op] : {std::pair{U"(?:", "(?:"},
                                      {U"(?=", "(?="},
                                      {U"(?!", "(?!"},
                                      {U"(?<=", "(?<="},
                                      {U"(?<!", "(?<!"},
                                      {U"(?>", "(?>"}}) {
      if (accept(written)) return add_operator(op);
    }
    if (accept(U"(?i:")) {
      ignore_case_ = true;
    } else if (accept(U"(?-i:")) {
      ignore_case_ = false;
    } else {
      require(!at(U"(?"), begin, "a group");
      ++position_;  // nobody asks for what the group matched
    }
    add_operator("(?:");
  }

  void parse_suffix(std::string op) {
    if (!done() && (chars_[position_] == U'?' || chars_[position_] == U'+')) {
      op += static_cast<char>(chars_[position_++]);
    }
    add_operator(op);
  }

  // {n} {n,} {n,m} {,m}; Oniguruma reads {n}? and {n,m}+ otherwise than PCRE2.
  void parse_interval(size_t begin) {
    const auto number = [&] {
      std::string digits;
      while (!done() && is_digit(chars_[position_])) digits += static_cast<char>(chars_[position_++]);
      return digits;
    };
    const std::string min = number();
    const bool range = accept(U",");
    const std::string max = range ? number() : "";
    require(accept(U"}") && (!min.empty() || !max.empty()), begin, "a brace that is no interval");
    require(!at(U"+") && (range || !at(U"?")), begin, "an interval with a suffix");
    add_operator("{" + (min.empty() ? "0" : min) + (range ? "," : "") + max + "}");
    if (accept(U"?")) add_operator("?");
  }

  void parse_escape(size_t begin) {
    require(!done(), begin, "a backslash at the end");
    if (accept(U"A")) return add_operator("\\A");
    if (accept(U"z")) return add_operator("\\z");
    CodePointSet set;
    char32_t literal = 0;
    if (parse_set_escape(begin, set)) {
      require(!ignore_case_, begin, "a class without regard to case");
      add_set(std::move(set));
    } else {
      literal = parse_character_escape(begin);
      add_literal(literal, begin);
    }
  }

  // \s \S \d \D \p{..} \P{..} behind the backslash.
  bool parse_set_escape(size_t begin, CodePointSet& set) {
    if (accept(U"s")) {
      set = white_space();
    } else if (accept(U"S")) {
      set = complement(white_space());
    } else if (accept(U"d")) {
      set.categories = categories_named("Nd");
    } else if (accept(U"D")) {
      set.categories = ~categories_named("Nd") & kAllCategories;
    } else if (at(U"p{") || at(U"P{")) {
      bool negated = chars_[position_] == U'P';
      position_ += 2;
      if (accept(U"^")) negated = !negated;
      std::string name;
      while (!done() && is_letter(chars_[position_])) name += static_cast<char>(chars_[position_++]);
      set.categories = categories_named(name);
      require(set.categories != 0 && accept(U"}"), begin, "a property other than a general category");
      if (negated) set = complement(set);
    } else {
      return false;
    }
    return true;
  }

  char32_t parse_hex(size_t begin, size_t min_digits, size_t max_digits) {
    char32_t value = 0;
    size_t num_digits = 0;
    for (; num_digits < max_digits && !done(); ++num_digits, ++position_) {
      const char32_t c = chars_[position_];
      const char32_t lower = c | 0x20;
      if (is_digit(c)) {
        value = value * 16 + (c - U'0');
      } else if (lower >= U'a' && lower <= U'f') {
        value = value * 16 + (lower - U'a' + 10);
      } else {
        break;
      }
    }
    require(num_digits >= min_digits && value <= kLastCodePoint, begin, "a character's number");
    return value;
  }

  char32_t parse_character_escape(size_t begin) {
    const char32_t c = chars_[position_++];
    switch (c) {
      case U'n':
        return '\n';
      case U'r':
        return '\r';
      case U't':
        return '\t';
      case U'f':
        return '\f';
      case U'v':
        return '\v';
      case U'x': {
        if (!accept(U"{")) {
          const char32_t value = parse_hex(begin, 2, 2);
          require(value < 0x80, begin, "a byte");
          return value;
        }
        const char32_t value = parse_hex(begin, 1, 8);
        require(accept(U"}"), begin, "a character's number");
        return value;
      }
      case U'u':
        return parse_hex(begin, 4, 4);
      default:
        require(c < 0x80 && !is_letter(c) && !is_digit(c), begin, "an escape");
        return c;
    }
  }

  // Behind the bracket, to behind the closing one.
  CodePointSet parse_class(size_t begin) {
    CodePointSet result;
    result.negated = accept(U"^");
    require(!at(U"]"), begin, "a class that starts with a bracket");
    while (!accept(U"]")) {
      require(!done(), begin, "a class that is not closed");
      require(!at(U"[") && !at(U"&&"), position_, "a class within a class");
      const size_t item = position_;
      CodePointSet set;
      char32_t first;
      if (accept(U"\\")) {
        require(!done(), item, "a backslash at the end");
        if (parse_set_escape(item, set)) {
          require(!at(U"-") || at(U"-]"), item, "a range from a set");
          result.add(set);
          continue;
        }
        first = parse_character_escape(item);
      } else {
        first = chars_[position_++];
        require(first != U'-' || item == begin + 1 + result.negated || at(U"]"), item, "a hyphen between others");
      }
      char32_t last = first;
      if (at(U"-") && !at(U"-]")) {
        ++position_;
        require(!done() && !at(U"["), item, "a range");
        if (accept(U"\\")) {
          require(!done() && !parse_set_escape(item, set), item, "a range to a set");
          last = parse_character_escape(item);
        } else {
          last = chars_[position_++];
        }
        require(first <= last, item, "an empty range");
      }
      result.ranges.emplace_back(first, last);
    }
    return result;
  }

  const std::string& pattern_;
  std::u32string chars_;
  std::vector<size_t> offsets_;  // of each character in the pattern, and its size
  size_t position_ = 0;
  bool ignore_case_ = false;
  std::vector<bool> groups_;      // what ignore_case_ was outside of each open group
  char32_t previous_folded_ = 0;  // the letter before, if it was read without regard to case
  RegexParts parts_;
};

}  // namespace

void CodePointSet::add(const CodePointSet& other) {
  categories |= other.categories;
  ranges.insert(ranges.end(), other.ranges.begin(), other.ranges.end());
}

RegexParts parse_regex(const std::string& pattern) { return Parser(pattern).parse(); }

}  // namespace baseq
