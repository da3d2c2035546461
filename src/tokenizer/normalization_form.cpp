#include "normalization_form.h"

#include <c10/util/Exception.h>
#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <bitset>
#include <memory>
#include <vector>

#include "unicode.h"

namespace baseq {
namespace {

constexpr char32_t kEnd = 0x110000;
constexpr utf8proc_ssize_t kLongestDecomposition = 18;  // U+FDFA

bool is_compatibility(NormalizationForm form) {
  return form == NormalizationForm::kNfkc || form == NormalizationForm::kNfkd;
}
bool composes(NormalizationForm form) { return form == NormalizationForm::kNfc || form == NormalizationForm::kNfkc; }

void append_decomposition(char32_t c, bool compatibility, std::vector<utf8proc_int32_t>& out) {
  const auto options =
      static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | (compatibility ? UTF8PROC_COMPAT : 0));
  const size_t size = out.size();
  out.resize(size + kLongestDecomposition);
  int boundary = 0;
  const auto length = utf8proc_decompose_char(static_cast<utf8proc_int32_t>(c), out.data() + size,
                                              kLongestDecomposition, options, &boundary);
  TORCH_INTERNAL_ASSERT(length > 0 && length <= kLongestDecomposition);
  out.resize(size + static_cast<size_t>(length));
}

int combining_class(utf8proc_int32_t c) { return utf8proc_get_property(c)->combining_class; }

void compose(std::vector<utf8proc_int32_t>& chars) {
  const auto options = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
  const auto length = utf8proc_normalize_utf32(chars.data(), static_cast<utf8proc_ssize_t>(chars.size()), options);
  TORCH_INTERNAL_ASSERT(length >= 0);
  chars.resize(static_cast<size_t>(length));
}

// utf8proc sorts marks by exchanging neighbours, which is quadratic in a long run of them.
void sort_marks(std::vector<utf8proc_int32_t>& chars) {
  for (size_t begin = 0; begin < chars.size();) {
    if (combining_class(chars[begin]) == 0) {
      ++begin;
      continue;
    }
    size_t end = begin;
    while (end < chars.size() && combining_class(chars[end]) != 0) ++end;
    std::stable_sort(chars.begin() + static_cast<std::ptrdiff_t>(begin),
                     chars.begin() + static_cast<std::ptrdiff_t>(end),
                     [](auto a, auto b) { return combining_class(a) < combining_class(b); });
    begin = end;
  }
}

// Code points that a form leaves alone wherever they stand, except that marks behind them may join them: those of
// combining class 0 that are their own normal form and never the second of a composition.
class InertTable {
 public:
  static const InertTable& instance(NormalizationForm form) {
    static const std::unique_ptr<const InertTable> tables[] = {
        std::unique_ptr<const InertTable>(new InertTable(false, true)),
        std::unique_ptr<const InertTable>(new InertTable(false, false)),
        std::unique_ptr<const InertTable>(new InertTable(true, true)),
        std::unique_ptr<const InertTable>(new InertTable(true, false))};
    return *tables[static_cast<size_t>(form)];
  }
  bool contains(char32_t c) const { return inert_[c]; }

 private:
  InertTable(bool compatibility, bool composing) {
    inert_.set();
    std::vector<utf8proc_int32_t> chars;
    for (char32_t c = 0; c < kEnd; ++c) {
      if (is_unknown_to_normalization(c)) continue;
      chars.clear();
      append_decomposition(c, false, chars);
      if (composing && chars.size() > 1) second_.set(static_cast<size_t>(chars.back()));
      if (compatibility) {
        chars.clear();
        append_decomposition(c, true, chars);
      }
      if (composing && chars.size() > 1) compose(chars);
      const bool itself = chars.size() == 1 && static_cast<char32_t>(chars[0]) == c;
      if (!itself || combining_class(static_cast<utf8proc_int32_t>(c)) != 0) inert_.reset(c);
    }
    for (char32_t c = 0; c < kEnd; ++c) {
      if (second_[c] && !is_unknown_to_normalization(c)) inert_.reset(c);
    }
  }

  std::bitset<kEnd> inert_, second_;
};

}  // namespace

std::string to_normalization_form(std::string_view text, NormalizationForm form) {
  const InertTable& inert = InertTable::instance(form);
  std::string result;
  size_t copied = 0;    // what lies before is in the result
  size_t previous = 0;  // the inert code point before the current one, that marks may join; else the current one
  std::vector<utf8proc_int32_t> chars;
  for (size_t i = 0; i < text.size();) {
    const auto [c, num_bytes] = code_point_at(text, i);
    if (inert.contains(c)) {
      previous = is_unknown_to_normalization(c) ? i + num_bytes : i;
      i += num_bytes;
      continue;
    }
    result += text.substr(copied, previous - copied);
    chars.clear();
    for (copied = previous; copied < text.size();) {
      const auto [next, length] = code_point_at(text, copied);
      if (copied >= i && inert.contains(next)) break;
      append_decomposition(next, is_compatibility(form), chars);
      copied += length;
    }
    sort_marks(chars);
    if (composes(form)) compose(chars);
    for (const utf8proc_int32_t composed : chars) append_utf8(static_cast<char32_t>(composed), result);
    i = previous = copied;
  }
  result += text.substr(copied);
  return result;
}

}  // namespace baseq
