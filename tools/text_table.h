#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace baseq::cli {

/// Rows of a table in Markdown, columns aligned.
/// @param text_columns the first ones are aligned left, the others, numbers, right
std::string markdown_table(const std::vector<std::vector<std::string>>& rows, size_t text_columns);

/// `value` with `digits` behind the point and `unit` behind it; "-" for null.
std::string show_number(const nlohmann::json& value, int digits, double factor = 1, const char* unit = "");

}  // namespace baseq::cli
