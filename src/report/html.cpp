#include "html.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

namespace baseq {
namespace {

/// The library that reads the files replaces invalid bytes when it writes a string.
std::string valid_utf8(std::string_view text) {
  const std::string quoted = nlohmann::json(text).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  return nlohmann::json::parse(quoted).get<std::string>();
}

}  // namespace

std::string escape_html(std::string_view text) {
  std::string escaped;
  for (const char c : valid_utf8(text)) {
    switch (c) {
      case '&':
        escaped += "&amp;";
        break;
      case '<':
        escaped += "&lt;";
        break;
      case '>':
        escaped += "&gt;";
        break;
      case '"':
        escaped += "&quot;";
        break;
      case '\'':
        escaped += "&#39;";
        break;
      default:
        // Control characters are not allowed in HTML, escaped or not.
        if (static_cast<unsigned char>(c) >= 0x20 || c == '\n' || c == '\t') escaped += c;
    }
  }
  return escaped;
}

HtmlTable::HtmlTable(std::vector<std::string> header, size_t text_columns)
    : header_(std::move(header)), text_columns_(text_columns) {}

void HtmlTable::row(const std::vector<std::string>& cells) {
  rows_ += "<tr>";
  for (size_t i = 0; i < cells.size(); ++i) {
    const char* tag = i == 0 ? "th scope=\"row\"" : i < text_columns_ ? "td" : "td class=\"number\"";
    rows_ += fmt::format("<{}>{}</{}>", tag, escape_html(cells[i]), i == 0 ? "th" : "td");
  }
  rows_ += "</tr>\n";
}

std::string HtmlTable::html() const {
  std::string head;
  for (size_t i = 0; i < header_.size(); ++i) {
    head += fmt::format("<th scope=\"col\"{}>{}</th>", i < text_columns_ ? "" : " class=\"number\"",
                        escape_html(header_[i]));
  }
  return fmt::format("<div class=\"scroll\"><table>\n<thead><tr>{}</tr></thead>\n<tbody>\n{}</tbody></table></div>\n",
                     head, rows_);
}

}  // namespace baseq
