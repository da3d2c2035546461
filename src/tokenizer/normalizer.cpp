#include "normalizer.h"

#include <algorithm>
#include <utility>

#include "unicode.h"

namespace baseq {
namespace {

void lowercase_all(std::string_view text, std::string& result) {
  for (size_t i = 0; i < text.size();) {
    const auto [c, num_bytes] = code_point_at(text, i);
    if (c == 0x130) {
      result += "i\u0307";
    } else {
      append_utf8(lowercase(c), result);
    }
    i += num_bytes;
  }
}

void apply(NormalizationForm form, NormalizedText& value, size_t /*original*/) {
  const size_t first_size =
      to_normalization_form(std::string_view(value.text).substr(0, value.first_size), form).size();
  value.text = to_normalization_form(value.text, form);
  value.first_size = value.first_size == 0 ? 0 : std::clamp<size_t>(first_size, 1, value.text.size());
}

void apply(const normalizers::Prepend& step, NormalizedText& value, size_t /*original*/) {
  if (value.text.empty()) return;
  value.text.insert(0, step.prepend);
  if (value.first_size > 0) value.first_size += step.prepend.size();
}

// What replaces a match stands for the last character of the match.
void apply(const normalizers::Replace& step, NormalizedText& value, size_t original) {
  const std::string_view text = value.text;
  Regex::Workspace workspace;
  std::string result;
  size_t done = 0, first_size = 0;
  const auto append = [&](std::string_view part, size_t of_first) {
    if (first_size == result.size()) first_size += of_first;
    result += part;
    check_growth(original, result.size());
  };
  const auto keep = [&](size_t end) {
    append(text.substr(done, end - done), std::min(end, std::max(done, value.first_size)) - done);
  };
  step.pattern.for_each_match(text, workspace, [&](size_t begin, size_t end) {
    keep(begin);
    const bool of_first = end - code_point_before(text, end).num_bytes < value.first_size;
    append(step.content, of_first ? step.content.size() : 0);
    done = end;
  });
  keep(text.size());
  value = {std::move(result), first_size};
}

void apply(normalizers::Lowercase, NormalizedText& value, size_t /*original*/) {
  std::string result;
  result.reserve(value.text.size());
  lowercase_all(std::string_view(value.text).substr(0, value.first_size), result);
  const size_t first_size = result.size();
  lowercase_all(std::string_view(value.text).substr(value.first_size), result);
  value = {std::move(result), first_size};
}

void apply(const normalizers::Strip& step, NormalizedText& value, size_t /*original*/) {
  const CharTable& table = CharTable::instance();
  const std::string_view text = value.text;
  size_t begin = 0, end = text.size();
  while (step.strip_left && begin < end) {
    const auto [c, num_bytes] = code_point_at(text, begin);
    if (!table.is_space(c)) break;
    begin += num_bytes;
  }
  while (step.strip_right && begin < end) {
    const auto [c, num_bytes] = code_point_before(text, end);
    if (!table.is_space(c)) break;
    end -= num_bytes;
  }
  value = {std::string(text.substr(begin, end - begin)), value.first_size - std::min(value.first_size, begin)};
}

}  // namespace

NormalizedText normalize(const std::vector<Normalizer>& steps, std::string_view text) {
  NormalizedText value{std::string(text), text.empty() ? 0 : code_point_at(text, 0).num_bytes};
  for (const Normalizer& step : steps) {
    std::visit([&](const auto& s) { apply(s, value, text.size()); }, step);
    check_growth(text.size(), value.text.size());
    // The end may be stripped, and what the first character falls apart into be sorted or joined with what follows it.
    size_t& first = value.first_size = std::min(value.first_size, value.text.size());
    while (first < value.text.size() && (static_cast<uint8_t>(value.text[first]) & 0xC0) == 0x80) ++first;
  }
  return value;
}

}  // namespace baseq
