#include "help.h"

#include <algorithm>
#include <cctype>
#include <functional>
#include <sstream>
#include <vector>

namespace baseq::cli {
namespace {

constexpr size_t kColumns = 100, kIndentation = 28;

/// `left` in the first column and `right`, wrapped, in the second one.
std::string row(const std::string& left, const std::string& right) {
  std::string text = "  " + left;
  const std::string next_line = "\n" + std::string(kIndentation, ' ');
  text += text.size() + 1 < kIndentation ? std::string(kIndentation - text.size(), ' ') : next_line;
  size_t column = kIndentation;
  std::istringstream words(right);
  for (std::string word; words >> word;) {
    if (column > kIndentation && column + 1 + word.size() > kColumns) {
      text += next_line;
      column = kIndentation;
    }
    if (column > kIndentation) text += ' ';
    text += word;
    column += word.size() + 1;
  }
  return text + "\n";
}

std::string value_suffix(const CLI::Option& option) {
  const std::string name = value_name(option);
  return name.empty() ? "" : " " + name;
}

using Filter = std::function<bool(const CLI::Option*)>;

std::string section(const CLI::Formatter& formatter, const CLI::App& app, const std::string& title,
                    const Filter& filter) {
  std::string rows;
  for (const CLI::Option* option : app.get_options(filter)) {
    const bool positional = option->get_positional();
    rows += row(formatter.make_option_name(option, positional) + (positional ? "" : value_suffix(*option)),
                describe(*option));
  }
  return rows.empty() ? "" : "\n" + title + ":\n" + rows;
}

}  // namespace

std::string value_name(const CLI::Option& option) {
  if (option.get_type_size() == 0) return "";
  std::string name = option.get_type_name();
  const size_t colon = name.find(':');
  const std::string check = colon == name.npos ? "" : name.substr(colon + 1);
  if (colon != name.npos) name = check.find(" in [") == check.npos ? check : name.substr(0, colon);
  if (name == "INT") name = "N";
  if (name.starts_with('{')) name = name.substr(1, name.size() - 2);
  std::replace(name.begin(), name.end(), ',', '|');
  return name;
}

std::string describe(const CLI::Option& option) {
  const std::string& value = option.get_default_str();
  const bool required = option.get_required() && !option.get_positional();
  return option.get_description() + (value.empty() ? "" : " (default: " + value + ")") +
         (required ? " (required)" : "");
}

std::string HelpFormatter::make_option_name(const CLI::Option* option, bool is_positional) const {
  std::string name = option->get_name(is_positional, !is_positional);
  if (!is_positional) return name;
  std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::toupper(c); });
  return name;
}

std::string HelpFormatter::make_help(const CLI::App* app, std::string name, CLI::AppFormatMode) const {
  std::string text = app->get_description() + ".\n\n" + make_usage(app, std::move(name));
  text += section(*this, *app, "Arguments", [](const CLI::Option* option) { return option->get_positional(); });
  for (const std::string& group : app->get_groups()) {
    if (group.empty()) continue;
    text += section(*this, *app, group, [&](const CLI::Option* option) {
      return !option->get_positional() && option->get_group() == group;
    });
  }
  std::string commands;
  for (const CLI::App* command : app->get_subcommands([](const CLI::App*) { return true; })) {
    if (!command->get_group().empty()) commands += row(command->get_name(), command->get_description());
  }
  if (!commands.empty()) text += "\nCommands:\n" + commands;
  return text + (app->get_footer().empty() ? "" : "\n" + app->get_footer() + "\n");
}

void begin_group(CLI::App& command, const std::string& name) { command.option_defaults()->group(name); }

std::string with_flags(const std::string& text, const CLI::App& app) {
  const auto commands = app.get_subcommands();
  if (commands.empty()) return text;
  std::string said;
  size_t end = 0;
  for (size_t begin = text.find('`'); begin != text.npos; begin = text.find('`', end)) {
    const size_t close = text.find('`', begin + 1);
    if (close == text.npos) break;
    std::string flag = "--" + text.substr(begin + 1, close - begin - 1);
    std::replace(flag.begin(), flag.end(), '_', '-');
    const bool known = commands.back()->get_option_no_throw(flag) != nullptr;
    said += text.substr(end, begin - end) + (known ? flag : text.substr(begin, close - begin));
    end = known ? close + 1 : close;
  }
  return said + text.substr(end);
}

}  // namespace baseq::cli
