#include <fmt/format.h>

#include <cctype>
#include <filesystem>
#include <memory>
#include <sstream>

#include "baseq/version.h"
#include "command_table.h"
#include "commands.h"
#include "completions.h"
#include "help.h"
#include "io/output_file.h"

namespace baseq::cli {
namespace {

/// Text as roff takes it: no backslash, hyphen or dot in front that means something else.
std::string roff(const std::string& text) {
  std::string result;
  bool at_start = true;
  for (const char c : text) {
    if (at_start && (c == '.' || c == '\'')) result += "\\&";
    if (c == '\\') {
      result += "\\e";
    } else if (c == '-') {
      result += "\\-";
    } else {
      result += c;
    }
    at_start = c == '\n';
  }
  return result;
}

std::string upper(std::string text) {
  for (char& c : text) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  return text;
}

std::string heading(const std::string& page, const std::string& description) {
  return fmt::format(".TH {} 1 \"\" \"baseq {}\" \"User Commands\"\n.SH NAME\n{} \\- {}\n", upper(roff(page)),
                     version(), roff(page), roff(description));
}

std::string options_of(const CommandRow& command) {
  std::string text, group = "";
  for (const OptionRow& option : command.options) {
    const std::string title = option.flags.empty() ? "Arguments" : option.group;
    if (title.empty()) continue;
    if (title != group) text += fmt::format(".SS {}\n", roff(title));
    group = title;
    text += fmt::format(".TP\n\\fB{}\\fR", roff(option.name));
    if (!option.flags.empty() && !option.value.empty()) text += fmt::format(" \\fI{}\\fR", roff(option.value));
    text += "\n" + roff(option.description) + "\n";
  }
  return text;
}

std::string page_of(const CommandRow& command) {
  std::string arguments;
  for (const OptionRow& option : command.options) {
    if (option.flags.empty()) arguments += fmt::format(" [\\fI{}\\fR]", roff(option.name));
  }
  return heading("baseq-" + command.name, command.description) +
         fmt::format(".SH SYNOPSIS\n\\fBbaseq {}\\fR{} [\\fIOPTIONS\\fR]\n.SH OPTIONS\n{}", roff(command.name),
                     arguments, options_of(command)) +
         (command.footer.empty() ? "" : fmt::format(".SH EXAMPLES\n.nf\n{}\n.fi\n", roff(command.footer))) +
         ".SH SEE ALSO\n\\fBbaseq\\fR(1)\n";
}

std::string main_page(const CLI::App& app, const std::vector<CommandRow>& table) {
  std::string text = heading("baseq", app.get_description()) +
                     ".SH SYNOPSIS\n\\fBbaseq\\fR \\fICOMMAND\\fR [\\fIOPTIONS\\fR]\n.SH COMMANDS\n";
  for (const CommandRow& command : table) {
    text += fmt::format(".TP\n\\fBbaseq\\-{}\\fR(1)\n{}\n", roff(command.name), roff(command.description));
  }
  return text +
         ".SH EXIT STATUS\n0 success, 1 failure, 2 wrong usage, 130 interrupted.\n"
         ".SH ENVIRONMENT\n\\fBOMP_NUM_THREADS\\fR, \\fBHF_HOME\\fR, \\fBHF_HUB_CACHE\\fR, \\fBTMPDIR\\fR, "
         "\\fBGOMP_SPINCOUNT\\fR\n";
}

}  // namespace

void add_manual(CLI::App& app) {
  auto directory = std::make_shared<std::string>();
  CLI::App* command = app.add_subcommand("manual", "Write man pages and completions into a directory");
  command->group("");
  command->add_option("directory", *directory, "Directory that is laid out as /usr/share")->required();
  command->footer("Example:\n  baseq manual share");
  command->callback([directory, &app] {
    namespace fs = std::filesystem;
    const std::vector<CommandRow> table = command_table(app);
    const auto write = [&](const fs::path& file, const std::string& text) {
      fs::create_directories((fs::path(*directory) / file).parent_path());
      write_output_file(fs::path(*directory) / file, text);
    };
    write("bash-completion/completions/baseq", completion_script("bash", table));
    // zsh of Debian looks into the second one.
    for (const char* folder : {"site-functions", "vendor-completions"}) {
      write(fmt::format("zsh/{}/_baseq", folder), completion_script("zsh", table));
    }
    write("fish/vendor_completions.d/baseq.fish", completion_script("fish", table));
    write("man/man1/baseq.1", main_page(app, table));
    for (const CommandRow& row : table) write("man/man1/baseq-" + row.name + ".1", page_of(row));
  });
}

}  // namespace baseq::cli
