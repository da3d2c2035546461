#include "next_step.h"

#include <cstdio>

#include "printable.h"
#include "standard_streams.h"

namespace baseq::cli {

std::string single_quoted(const std::string& text) {
  std::string quoted = "'";
  for (const char c : text) quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return quoted + "'";
}

std::string shell_word(const std::string& word) {
  constexpr const char* kPlain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./@:+=,%";
  if (!word.empty() && word.find_first_not_of(kPlain) == word.npos) return word;
  return single_quoted(word);
}

void print_next(const std::string& step) {
  // Behind the results, also where both streams are the same file.
  flush_stdout();
  std::fputs((printable("next: " + step) + "\n").c_str(), stderr);
}

}  // namespace baseq::cli
