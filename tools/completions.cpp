#include "completions.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <memory>

#include "commands.h"
#include "help.h"
#include "next_step.h"
#include "output_files.h"

namespace baseq::cli {
namespace {

/// `text` with each of `special` behind a backslash.
std::string escaped(const std::string& text, std::string_view special) {
  std::string result;
  for (const char c : text) {
    if (special.find(c) != special.npos) result += '\\';
    result += c;
  }
  return result;
}

std::string names_of(const std::vector<CommandRow>& table) {
  std::vector<std::string> names;
  for (const CommandRow& command : table) names.push_back(command.name);
  return fmt::format("{}", fmt::join(names, " "));
}

std::string bash_script(const std::vector<CommandRow>& table) {
  std::string values, options;
  for (const CommandRow& command : table) {
    std::vector<std::string> flags;
    for (const OptionRow& option : command.options) {
      flags.insert(flags.end(), option.flags.begin(), option.flags.end());
      for (const std::string& flag : option.flags) {
        if (option.value.empty()) continue;
        values +=
            fmt::format("    '{} {}') values={} files={} ;;\n", command.name, flag,
                        single_quoted(fmt::format("{}", fmt::join(option.choices, " "))), option.takes_file ? 1 : 0);
      }
    }
    options += fmt::format("    {}) options='{}' ;;\n", command.name, fmt::join(flags, " "));
  }
  return fmt::format(R"(# bash completion of baseq; made by: baseq completions bash
_baseq() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD - 1]}} command=${{COMP_WORDS[1]}}
  local values= options= files=1
  COMPREPLY=()
  if [[ $COMP_CWORD -eq 1 ]]; then
    mapfile -t COMPREPLY < <(compgen -W '{} --help --version' -- "$current")
    return
  fi
  case "$command $previous" in
{}  esac
  if [[ $previous != -* && $current == -* ]] || [[ -z $values && $current == --* ]]; then
    case "$command" in
{}    esac
    mapfile -t COMPREPLY < <(compgen -W "$options --help" -- "$current")
    return
  fi
  mapfile -t COMPREPLY < <(compgen -W "$values" -- "$current"; [[ $files -eq 0 ]] || compgen -f -- "$current")
}}
complete -o filenames -F _baseq baseq
)",
                     names_of(table), values, options);
}

std::string zsh_script(const std::vector<CommandRow>& table) {
  std::string commands, options;
  for (const CommandRow& command : table) {
    commands += fmt::format("    {}\n", single_quoted(command.name + ":" + escaped(command.description, ":")));
    options += fmt::format("    {}) _arguments -S \\\n", command.name);
    for (const OptionRow& option : command.options) {
      for (const std::string& flag : option.flags) {
        std::string spec = fmt::format("*{}[{}]", flag, escaped(option.description, "[]"));
        if (!option.value.empty()) {
          const std::string choices = fmt::format("({})", fmt::join(option.choices, " "));
          spec += fmt::format(":{}:{}", escaped(option.value, ":"), option.choices.empty() ? "_files" : choices);
        }
        options += fmt::format("      {} \\\n", single_quoted(spec));
      }
    }
    options += "      '*:file:_files' ;;\n";
  }
  return fmt::format(R"(#compdef baseq
# zsh completion of baseq; made by: baseq completions zsh
_baseq() {{
  local -a commands
  commands=(
{})
  if (( CURRENT == 2 )); then
    _describe command commands
    return
  fi
  local command=$words[2]
  shift words
  (( CURRENT -= 1 ))
  case $command in
{}  esac
}}
# zsh calls this file as the function _baseq where it finds it by itself; a shell that sources it gets the function.
if [[ $funcstack[1] == _baseq ]]; then
  _baseq "$@"
else
  compdef _baseq baseq
fi
)",
                     commands, options);
}

std::string fish_script(const std::vector<CommandRow>& table) {
  std::string script = "# fish completion of baseq; made by: baseq completions fish\n";
  const auto text = [](const std::string& value) { return "'" + escaped(value, "\\'") + "'"; };
  for (const CommandRow& command : table) {
    script += fmt::format("complete -c baseq -n __fish_use_subcommand -f -a {} -d {}\n", command.name,
                          text(command.description));
    for (const OptionRow& option : command.options) {
      for (const std::string& flag : option.flags) {
        script += fmt::format("complete -c baseq -n '__fish_seen_subcommand_from {}' -l {} -d {}", command.name,
                              flag.substr(2), text(option.description));
        if (!option.value.empty()) script += option.takes_file ? " -r" : " -x";
        if (!option.choices.empty()) script += fmt::format(" -a '{}'", fmt::join(option.choices, " "));
        script += "\n";
      }
    }
  }
  return script;
}

}  // namespace

std::string completion_script(const std::string& shell, const std::vector<CommandRow>& table) {
  if (shell == "bash") return bash_script(table);
  return shell == "zsh" ? zsh_script(table) : fish_script(table);
}

void add_completions(CLI::App& app) {
  auto shell = std::make_shared<std::string>();
  CLI::App* command = app.add_subcommand("completions", "Print the completions of a shell");
  command->group("");
  command->add_option("shell", *shell, "bash, zsh or fish")->required()->check(CLI::IsMember({"bash", "zsh", "fish"}));
  command->footer(
      "Examples:\n"
      "  source <(baseq completions bash)\n"
      "  baseq completions fish > ~/.config/fish/completions/baseq.fish");
  command->callback([shell, &app] { print_text("{}", completion_script(*shell, command_table(app))); });
}

}  // namespace baseq::cli
