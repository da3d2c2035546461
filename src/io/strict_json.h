#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace baseq {

/// What a key that stands twice in one object means.
enum class DuplicateKeys {
  kRefuse,    ///< an error: two readers could see two different files
  kLastWins,  ///< as in Python's json module
};

/// Parses JSON from a file nobody vouches for. Throws one sentence that begins with `where` ("the header of x") and
/// gives the position: syntax errors, invalid UTF-8, NUL bytes, nesting deeper than 64, and duplicate keys if refused.
nlohmann::json parse_json(std::string_view text, const std::string& where, DuplicateKeys duplicates);

/// JSON text of `value`, indented by `indent` spaces (-1: on one line). Throws when a string is not valid UTF-8.
std::string dump_json(const nlohmann::json& value, const std::string& where, int indent = -1);

/// `text` in double quotes for an error message: ASCII, control characters escaped, shortened when it is very long.
std::string quote(std::string_view text);

}  // namespace baseq
