#pragma once

#include <spdlog/formatter.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <string>
#include <string_view>

/// What a file says, as a terminal may show it.
namespace baseq::cli {

/// UTF-8 `text` with escapes such as \x1b in place of control characters, which could move the cursor, set the title or
/// hide other lines. Line breaks and tabs stay.
std::string printable(std::string_view text);

/// Formats as `inner` does what printable() leaves of a message, or of its first bytes: a file may ask for a sentence
/// of megabytes. Options that the library names become flags of the subcommand of `app` that runs, see with_flags().
class PrintableFormatter : public spdlog::formatter {
 public:
  PrintableFormatter(std::unique_ptr<spdlog::formatter> inner, const CLI::App& app)
      : inner_(std::move(inner)), app_(app) {}
  void format(const spdlog::details::log_msg& message, spdlog::memory_buf_t& out) override;
  std::unique_ptr<spdlog::formatter> clone() const override;

 private:
  std::unique_ptr<spdlog::formatter> inner_;
  const CLI::App& app_;
};

}  // namespace baseq::cli
