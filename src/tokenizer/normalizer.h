#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "normalization_form.h"
#include "regex.h"

namespace baseq {

/// Steps of the normalizer of a tokenizer.json, by their names there.
namespace normalizers {

struct Prepend {
  std::string prepend;
};
struct Replace {
  Pattern pattern;
  std::string content;
};
struct Lowercase {};
struct Strip {
  bool strip_left, strip_right;
};

}  // namespace normalizers

using Normalizer = std::variant<NormalizationForm, normalizers::Prepend, normalizers::Replace, normalizers::Lowercase,
                                normalizers::Strip>;

struct NormalizedText {
  std::string text;
  /// Bytes at its start that stand for the first character of the original: Metaspace's prepend_scheme "first" asks.
  size_t first_size;
};

/// Valid UTF-8 `text` after all `steps`.
NormalizedText normalize(const std::vector<Normalizer>& steps, std::string_view text);

}  // namespace baseq
