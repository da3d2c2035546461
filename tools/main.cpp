#include <c10/util/Exception.h>
#include <spdlog/pattern_formatter.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string_view>

#include "baseq/pipeline/job.h"
#include "commands.h"
#include "help.h"
#include "io/closest_word.h"
#include "printable.h"
#include "standard_streams.h"
#include "started_processes.h"

namespace {

// Written down in the README.
constexpr int kFailure = 1;
constexpr int kUsage = 2;
constexpr int kInterrupted = 130;  // as a shell reports a process that SIGINT ended

/// What a misspelled command or option was probably meant to be, as a sentence; empty when nothing is close.
std::string suggestion(const CLI::App& app, int argc, char** argv) {
  const auto said = [](const std::string& word, const std::vector<std::string>& known) {
    const std::string closest = baseq::closest_word(word, known);
    return closest.empty() || closest == word ? "" : word + " is not known; did you mean " + closest + "?\n";
  };
  std::vector<std::string> words;
  const CLI::App* command = nullptr;
  for (const CLI::App* known : app.get_subcommands([](const CLI::App*) { return true; })) {
    words.push_back(known->get_name());
    if (argc > 1 && words.back() == argv[1]) command = known;
  }
  if (argc > 1 && command == nullptr) return argv[1][0] == '-' ? "" : said(argv[1], words);
  words.clear();
  for (const CLI::Option* option : command == nullptr ? app.get_options() : command->get_options()) {
    for (const std::string& name : option->get_lnames()) words.push_back("--" + name);
  }
  for (int i = 2; i < argc; ++i) {
    const std::string word = std::string(argv[i]).substr(0, std::string_view(argv[i]).find('='));
    if (!word.starts_with("--") || std::find(words.begin(), words.end(), word) != words.end()) continue;
    if (const std::string sentence = said(word, words); !sentence.empty()) return sentence;
  }
  return "";
}

/// The program up to its exit status.
int run(int argc, char** argv) {
  if (!baseq::cli::open_closed_streams()) return kFailure;
  baseq::cli::keep_freed_memory();
  spdlog::set_default_logger(spdlog::stderr_color_mt("baseq"));
  CLI::App app{"baseq quantizes Llama-style Hugging Face checkpoints after training", "baseq"};
  auto pattern = std::make_unique<spdlog::pattern_formatter>("%^%l%$: %v");
  spdlog::set_formatter(std::make_unique<baseq::cli::PrintableFormatter>(std::move(pattern), app));
  app.formatter(std::make_shared<baseq::cli::HelpFormatter>());
  app.set_version_flag("--version", baseq::cli::describe_version,
                       "Versions of baseq and LibTorch, instruction set, threads and devices");
  app.require_subcommand(1);
  baseq::cli::add_quantize(app);
  baseq::cli::add_eval(app);
  baseq::cli::add_generate(app);
  baseq::cli::add_bench(app);
  baseq::cli::add_inspect(app);
  baseq::cli::add_tokenize(app);
  baseq::cli::add_export(app);
  baseq::cli::add_report(app);
  baseq::cli::add_compare(app);
  baseq::cli::add_sweep(app);
  baseq::cli::add_update(app);
  baseq::cli::add_recipes(app);
  baseq::cli::add_quickstart(app);
  baseq::cli::add_card(app);
  baseq::cli::add_completions(app);
  baseq::cli::add_manual(app);
  app.footer("baseq COMMAND --help shows the options of a command.");
  for (CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; })) {
    command->get_help_ptr()->group("");
  }
  try {
    try {
      app.parse(argc, argv);
    } catch (const CLI::ParseError& error) {
      if (app.exit(error) != 0) {
        std::fputs(suggestion(app, argc, argv).c_str(), stderr);
        return kUsage;
      }
    }
    baseq::cli::flush_stdout();
    return 0;
  } catch (const baseq::Interrupted& interrupted) {
    spdlog::warn("{}{}", baseq::cli::process_prefix(), interrupted.what());
    return kInterrupted;
  } catch (const c10::Error& error) {
    spdlog::error("{}{}", baseq::cli::process_prefix(), error.what_without_backtrace());
  } catch (const std::exception& error) {
    spdlog::error("{}{}", baseq::cli::process_prefix(), error.what());
  }
  return kFailure;
}

}  // namespace

int main(int argc, char** argv) {
  const int status = run(argc, argv);
  baseq::cli::leave_processes(status);
  return status;
}
