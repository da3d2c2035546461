#pragma once

#include <CLI/CLI.hpp>
#include <string>

namespace baseq::cli {

/// Help of at most 100 columns: the options of a group together, each with its kind of value, its default and no list
/// of the options that it excludes. An option of the group "" is not shown.
class HelpFormatter : public CLI::Formatter {
 public:
  std::string make_help(const CLI::App* app, std::string name, CLI::AppFormatMode mode) const override;
  std::string make_option_name(const CLI::Option* option, bool is_positional) const override;
};

/// The placeholder for the value of an option: FILE, N, ram|disk; empty for a flag. CLI11 has "TEXT:FILE", "INT:INT in
/// [1 - 4096]", "TEXT:{ram,disk}".
std::string value_name(const CLI::Option& option);

/// What an option is for, with its default.
std::string describe(const CLI::Option& option);

/// From here on the options that are added to `command` belong to a group of its help.
void begin_group(CLI::App& command, const std::string& name);

/// `text` with the flags of the running subcommand in place of the options that the library names, as in `force` or
/// `seq_len`, backticks included. What is no flag of it stays.
std::string with_flags(const std::string& text, const CLI::App& app);

}  // namespace baseq::cli
