#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace baseq {

/// `text` as character data or inside a quoted attribute; what is no valid UTF-8 becomes U+FFFD.
std::string escape_html(std::string_view text);

/// A table of plain texts; escaped. The first column is a heading, the others hold numbers unless they are
/// `text_columns`.
class HtmlTable {
 public:
  explicit HtmlTable(std::vector<std::string> header, size_t text_columns = 1);
  void row(const std::vector<std::string>& cells);
  bool empty() const { return rows_.empty(); }
  std::string html() const;

 private:
  std::vector<std::string> header_;
  size_t text_columns_;
  std::string rows_;
};

}  // namespace baseq
