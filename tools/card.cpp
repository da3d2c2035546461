#include <fmt/format.h>

#include <memory>

#include "eval_results.h"
#include "formats/model_card.h"
#include "help.h"
#include "io/files.h"
#include "io/hub_cache.h"
#include "next_step.h"
#include "output_files.h"
#include "text_table.h"

namespace baseq::cli {
namespace {

struct CardArguments {
  std::string model, text;
  std::vector<std::string> results;
};

/// The results that are about the model, as a section.
std::string measured_section(const CardArguments& arguments) {
  const std::string name = model_name(arguments.model);
  std::vector<std::vector<std::string>> rows{{"windows", "perplexity", "mean KL", "top-1 agreement"}};
  for (const std::string& file : arguments.results) {
    for (const nlohmann::json& result : read_results(file)) {
      if (model_name(result["model"].get<std::string>()) != name) continue;
      const auto count = [&](const char* key) { return show_number(result.value(key, nlohmann::json()), 0); };
      rows.push_back({fmt::format("{} of {} tokens", count("num_windows"), count("seq_len")),
                      show_number(result["perplexity"], 3), show_number(result.value("mean_kl", nlohmann::json()), 4),
                      show_number(result.value("top1_agreement", nlohmann::json()), 1, 100, " %")});
    }
  }
  TORCH_CHECK(rows.size() > 1, "no result is about ", name);
  const std::string on = arguments.text.empty() ? "" : " on " + arguments.text;
  return fmt::format("\n## Measured\n\n`baseq eval`{}; KL divergence and agreement are to the original model.\n\n{}",
                     on, markdown_table(rows, 1));
}

void run(const CardArguments& arguments) {
  constexpr size_t kMaxBytes = size_t{16} << 20;
  const std::filesystem::path card = std::filesystem::path(arguments.model) / kCardFile;
  std::error_code error;
  TORCH_CHECK(std::filesystem::is_regular_file(card, error), card.string(), ": does not exist");
  const std::string text = with_measured(read_file("card", card, kMaxBytes), measured_section(arguments));
  write_output_file(card, text);
  print_text("{}\n", card.string());
  say_next(false, "hf upload ORG/NAME {}", shell_word(arguments.model));
}

}  // namespace

void add_card(CLI::App& app) {
  auto arguments = std::make_shared<CardArguments>();
  CLI::App* command = app.add_subcommand("card", "Writes what eval measured into the model card of a checkpoint");
  command->add_option("model", arguments->model, "Directory that baseq quantized or exported")
      ->required()
      ->transform(checkpoint_directory());
  begin_group(*command, "Results");
  command->add_option("--results", arguments->results, "Files of eval --json or compare --json")
      ->required()
      ->check(CLI::ExistingFile);
  command->add_option("--on", arguments->text, "What the text is, such as \"the test split of WikiText-2\"")
      ->type_name("WORDS");
  command->footer("Example:\n  baseq card out --results out-eval.json --on \"the test split of WikiText-2\"");
  command->callback([arguments] { run(*arguments); });
}

}  // namespace baseq::cli
