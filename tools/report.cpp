#include "report/report.h"

#include <fmt/format.h>

#include <memory>

#include "baseq/formats/open_model.h"
#include "eval_results.h"
#include "help.h"
#include "io/hub_cache.h"
#include "io/json_object.h"
#include "next_step.h"
#include "output_files.h"

namespace baseq::cli {
namespace {

namespace fs = std::filesystem;

struct ReportArguments {
  std::string model, output, log;
  std::vector<std::string> results;
};

/// Results of the checkpoint called `name` in the files DIRECTORY-*.json of `folder`.
std::vector<nlohmann::json> results_in_folder(const fs::path& folder, const std::string& name) {
  const std::string directory = fs::path(name).filename().string();
  std::vector<fs::path> files;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(folder, ignored)) {
    const std::string file = entry.path().filename().string();
    if (file.starts_with(directory + "-") && file.ends_with(".json")) files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  std::vector<nlohmann::json> found;
  for (const fs::path& file : files) {
    try {
      for (nlohmann::json& result : results_in(read_json_file(file.string()))) {
        if (model_name(result["model"].get<std::string>()) == name) found.push_back(std::move(result));
      }
    } catch (const c10::Error&) {
      // Not ours: nobody named it.
    }
  }
  return found;
}

void run(const ReportArguments& arguments) {
  const std::string name = model_name(arguments.model);
  const fs::path directory = fs::absolute(arguments.model).lexically_normal() / "";
  // Files about a model in the cache of the Hub belong to the user's directory, not into the cache.
  const bool cached = name.find('/') != name.npos;
  const fs::path folder = cached ? fs::current_path() : directory.parent_path().parent_path();
  const fs::path output = arguments.output.empty() ? folder / (fs::path(name).filename().string() + "-report.html")
                                                   : fs::path(arguments.output);
  const OutputFile page{"--output", output.string(), kPageMark};
  check_outputs({}, {page});
  const Model model(open_model(arguments.model));
  Report report{.summary = summarize(model), .config = model.checkpoint().config(), .run = {}, .results = {}};
  const fs::path log = arguments.log.empty() ? directory / kRunLogFile : fs::path(arguments.log);
  if (!arguments.log.empty() || fs::exists(log)) report.run = read_run_log(log);
  if (arguments.results.empty()) report.results = results_in_folder(folder, name);
  for (const std::string& file : arguments.results) {
    const std::vector<nlohmann::json> found = read_results(file);
    report.results.insert(report.results.end(), found.begin(), found.end());
  }
  check_output_file(page.option, page.path, page.mark);
  write_output_file(output, html_report(report));
  print_text("{}\n", output.string());
  say_next(false, "open {} in a browser", output.string());
}

}  // namespace

void add_report(CLI::App& app) {
  auto arguments = std::make_shared<ReportArguments>();
  CLI::App* command = app.add_subcommand("report", "An HTML page of how a checkpoint was quantized and what it cost");
  command->add_option("model", arguments->model, "Directory of a quantized checkpoint")
      ->required()
      ->transform(checkpoint_directory());
  begin_group(*command, "Page");
  command
      ->add_option("--output", arguments->output,
                   "The page; default: MODEL-report.html next to the directory; - is stdout")
      ->transform(output_file());
  command
      ->add_option("--results", arguments->results,
                   "Files of eval --json or compare --json; default: MODEL-*.json beside the directory")
      ->check(CLI::ExistingFile);
  command->add_option("--log", arguments->log, "Events of the run; default: those in the checkpoint")
      ->check(CLI::ExistingFile);
  command->footer("Example:\n  baseq report out --results out-eval.json");
  command->callback([arguments] { run(*arguments); });
}

}  // namespace baseq::cli
