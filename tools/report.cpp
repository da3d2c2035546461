#include "baseq/eval/report.h"

#include <fmt/format.h>

#include <fstream>
#include <memory>

#include "baseq/io/json_object.h"
#include "commands.h"

namespace baseq::cli {
namespace {

namespace fs = std::filesystem;

struct ReportArguments {
  std::string model, output, log;
  std::vector<std::string> results;
};

bool is_result(const nlohmann::json& value) {
  return value.is_object() && value.contains("perplexity") && value.contains("model") && value["model"].is_string();
}

/// What `eval --json` or `compare --json` wrote; empty for any other JSON.
std::vector<nlohmann::json> results_in(const nlohmann::json& json) {
  if (is_result(json)) return {json};
  std::vector<nlohmann::json> found;
  if (json.is_object() && json.contains("models") && json["models"].is_array()) {
    for (const nlohmann::json& model : json["models"]) {
      if (is_result(model)) found.push_back(model);
    }
  }
  return found;
}

/// Results of this checkpoint in the files DIRECTORY-*.json beside it.
std::vector<nlohmann::json> results_beside(const fs::path& directory, const std::string& name) {
  std::vector<fs::path> files;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(directory.parent_path(), ignored)) {
    const std::string file = entry.path().filename().string();
    if (file.starts_with(name + "-") && file.ends_with(".json")) files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  std::vector<nlohmann::json> found;
  for (const fs::path& file : files) {
    try {
      for (nlohmann::json& result : results_in(read_json_file(file.string()))) {
        if (directory_name(result["model"].get<std::string>()) == name) found.push_back(std::move(result));
      }
    } catch (const c10::Error&) {
      // Not ours: nobody named it.
    }
  }
  return found;
}

void run(const ReportArguments& arguments) {
  const Checkpoint checkpoint(arguments.model);
  const Model model(checkpoint);
  Report report{.summary = summarize(checkpoint, model), .config = checkpoint.config(), .run = {}, .results = {}};
  const fs::path directory = fs::absolute(arguments.model).lexically_normal();
  const fs::path parent = directory.has_filename() ? directory : directory.parent_path();
  const fs::path log = arguments.log.empty() ? parent / kRunLogFile : fs::path(arguments.log);
  if (!arguments.log.empty() || fs::exists(log)) report.run = read_run_log(log);
  if (arguments.results.empty()) report.results = results_beside(parent, report.summary.name);
  for (const std::string& file : arguments.results) {
    std::vector<nlohmann::json> found = results_in(read_json_file(file));
    TORCH_CHECK(!found.empty(), file, ": holds no results; expected what eval --json or compare --json writes");
    report.results.insert(report.results.end(), found.begin(), found.end());
  }
  const fs::path output = arguments.output.empty() ? parent.parent_path() / (report.summary.name + "-report.html")
                                                   : fs::path(arguments.output);
  std::ofstream file(output, std::ios::binary | std::ios::trunc);
  file << html_report(report);
  file.close();
  TORCH_CHECK(file.good(), output.string(), ": cannot be written");
  fmt::print("{}\n", output.string());
}

}  // namespace

void add_report(CLI::App& app) {
  auto arguments = std::make_shared<ReportArguments>();
  CLI::App* command = app.add_subcommand("report", "An HTML page of how a checkpoint was quantized and what it cost");
  command->add_option("model", arguments->model, "Directory of a quantized checkpoint")
      ->required()
      ->transform(checkpoint_directory());
  command->add_option("--output", arguments->output, "The page; default: MODEL-report.html beside the directory");
  command
      ->add_option("--results", arguments->results,
                   "Files of eval --json or compare --json; default: MODEL-*.json beside the directory")
      ->check(CLI::ExistingFile);
  command->add_option("--log", arguments->log, "Events of the run; default: those in the checkpoint")
      ->check(CLI::ExistingFile);
  command->callback([arguments] { run(*arguments); });
}

}  // namespace baseq::cli
