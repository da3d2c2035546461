#pragma once

#include <string>
#include <string_view>

namespace baseq {

enum class NormalizationForm { kNfc, kNfd, kNfkc, kNfkd };

/// Unicode normalization (UAX 15) of valid UTF-8 `text`, in O(n log n) whatever the text. Code points that
/// `tokenizers` 0.22 does not know yet, though utf8proc does, stay as they are.
std::string to_normalization_form(std::string_view text, NormalizationForm form);

}  // namespace baseq
