#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

namespace baseq::cli {

/// An option as help, completions and man pages tell of it.
struct OptionRow {
  std::vector<std::string> flags;  ///< "--recipe"; empty: an argument
  std::string name;                ///< "--recipe", "MODEL"
  std::string group;
  std::string value;                 ///< "NAME|FILE", empty for a flag
  std::vector<std::string> choices;  ///< all values there are, or the names of the built-in recipes
  bool takes_file = false;
  std::string description;
};

struct CommandRow {
  std::string name, description, footer;
  std::vector<OptionRow> options;
};

/// The commands that the help of `app` shows, in its order.
std::vector<CommandRow> command_table(const CLI::App& app);

}  // namespace baseq::cli
