#pragma once

#include <fmt/format.h>

#include <string>
#include <utility>

namespace baseq::cli {

/// `text` in single quotes, as shells read them.
std::string single_quoted(const std::string& text);

/// `word` as a shell takes it: in quotes where it has other characters than names of files usually have.
std::string shell_word(const std::string& word);

void print_next(const std::string& step);

/// The line behind a command that succeeded: what could come next. On stderr; nothing with --quiet.
template <class... Args>
void say_next(bool quiet, fmt::format_string<Args...> format, Args&&... args) {
  if (!quiet) print_next(fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace baseq::cli
