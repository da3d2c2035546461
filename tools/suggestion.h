#pragma once

#include <string>
#include <vector>

namespace baseq::cli {

/// The word of `known` that `word` is probably a misspelling of; empty when none is close.
std::string closest_word(const std::string& word, const std::vector<std::string>& known);

}  // namespace baseq::cli
