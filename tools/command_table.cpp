#include "command_table.h"

#include <algorithm>
#include <cctype>

#include "baseq/pipeline/recipe.h"
#include "help.h"

namespace baseq::cli {
namespace {

std::vector<std::string> split_choices(const std::string& value) {
  std::vector<std::string> choices;
  for (size_t begin = 0; begin <= value.size();) {
    const size_t end = std::min(value.find('|', begin), value.size());
    choices.push_back(value.substr(begin, end - begin));
    begin = end + 1;
  }
  return choices;
}

OptionRow row_of(const CLI::Option& option) {
  OptionRow row{.group = option.get_group(), .value = value_name(option), .description = describe(option)};
  row.name = option.get_positional() ? option.get_name(true, false) : "--" + option.get_lnames().front();
  if (option.get_positional()) {
    for (char& c : row.name) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  } else {
    for (const std::string& name : option.get_lnames()) row.flags.push_back("--" + name);
  }
  const std::vector<std::string> parts = split_choices(row.value);
  row.takes_file = std::ranges::any_of(parts, [](const std::string& part) {
    return part == "FILE" || part == "DIR" || part == "PATH" || part == "MODEL";
  });
  if (std::ranges::find(parts, "NAME") != parts.end()) {
    for (const BuiltInRecipe& recipe : built_in_recipes()) row.choices.emplace_back(recipe.name);
  } else if (parts.size() > 1 && !row.takes_file && row.value.find('=') == row.value.npos) {
    row.choices = parts;
  }
  return row;
}

}  // namespace

std::vector<CommandRow> command_table(const CLI::App& app) {
  std::vector<CommandRow> table;
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; })) {
    if (command->get_group().empty()) continue;
    CommandRow row{
        .name = command->get_name(), .description = command->get_description(), .footer = command->get_footer()};
    for (const CLI::Option* option : command->get_options()) {
      if (option->get_positional() || !option->get_lnames().empty()) row.options.push_back(row_of(*option));
    }
    table.push_back(std::move(row));
  }
  return table;
}

}  // namespace baseq::cli
