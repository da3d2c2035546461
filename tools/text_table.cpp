#include "text_table.h"

#include <fmt/format.h>

#include <algorithm>

#include "printable.h"

namespace baseq::cli {
namespace {

/// Characters, not bytes, of UTF-8.
size_t width_of(const std::string& text) {
  return static_cast<size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; }));
}

/// What would end a cell or a row.
std::string cell_of(const std::string& text) {
  std::string cell;
  for (const char c : printable(text)) {
    if (c == '|') cell += '\\';
    cell += c == '\n' || c == '\t' ? ' ' : c;
  }
  return cell;
}

}  // namespace

std::string markdown_table(const std::vector<std::vector<std::string>>& rows, size_t text_columns) {
  std::vector<size_t> widths;
  for (const auto& row : rows) {
    widths.resize(std::max(widths.size(), row.size()), 3);
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], width_of(cell_of(row[i])));
  }
  std::string table;
  for (size_t r = 0; r < rows.size(); ++r) {
    for (size_t i = 0; i < widths.size(); ++i) {
      const std::string cell = i < rows[r].size() ? cell_of(rows[r][i]) : "";
      const std::string padding(widths[i] - width_of(cell), ' ');
      table += "| " + (i < text_columns ? cell + padding : padding + cell) + " ";
    }
    table += "|\n";
    if (r > 0) continue;
    for (size_t i = 0; i < widths.size(); ++i) {
      table += "|" + std::string(widths[i] + 1, '-') + (i < text_columns ? "-" : ":");
    }
    table += "|\n";
  }
  return table;
}

std::string show_number(const nlohmann::json& value, int digits, double factor, const char* unit) {
  return value.is_number() ? fmt::format("{:.{}f}{}", value.get<double>() * factor, digits, unit) : "-";
}

}  // namespace baseq::cli
