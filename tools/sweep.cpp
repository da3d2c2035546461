#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <csignal>
#include <fstream>
#include <memory>

#include "baseq/io/json_object.h"
#include "baseq/pipeline/quantize_checkpoint.h"
#include "child_process.h"
#include "commands.h"
#include "output_files.h"
#include "sweep_plan.h"
#include "text_table.h"

namespace baseq::cli {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

struct SweepArguments {
  CommonOptions common;
  std::string file;
  int64_t only = -1;
  bool list = false;
};

/// The files of one job, all beside each other in the output directory.
struct JobFiles {
  fs::path checkpoint, work, job, quantize, eval, events, log;

  JobFiles(const fs::path& output, const std::string& name)
      : checkpoint(output / name),
        work(output / (name + "-work")),
        job(output / (name + "-job.json")),
        quantize(output / (name + "-quantize.json")),
        eval(output / (name + "-eval.json")),
        events(output / (name + "-log.jsonl")),
        log(output / (name + "-output.txt")) {}
};

/// The last line that a process printed: its error.
std::string last_line(const fs::path& file) {
  std::ifstream stream(file);
  std::string line, last;
  while (std::getline(stream, line)) {
    if (!line.empty()) last = line;
  }
  return last;
}

std::string describe(const ChildStatus& status, const fs::path& log) {
  if (status.signal == SIGKILL) return "killed (out of memory?)";
  if (status.signal != 0) return fmt::format("ended by signal {}", status.signal);
  return last_line(log);
}

/// One sweep in its output directory.
class Sweep {
 public:
  Sweep(const SweepPlan& plan, const SweepArguments& arguments) : plan_(plan), arguments_(arguments) {
    fs::create_directories(plan.output);
  }

  /// What the job came to: "status" is "passed", "failed" or "interrupted"; what is there already is not made again.
  json run(const SweepJob& job) const {
    const JobFiles files(plan_.output, job.name);
    json result = describe_job(job);
    try {
      check_same_job(job, files);
      if (!job.recipe.empty() && !fs::exists(files.checkpoint)) {
        step(job, files, fs::exists(files.work / "run.json") ? resume(files) : quantize(job, files));
      }
      std::error_code ignored;
      fs::remove_all(files.work, ignored);
      if (evaluates() && !fs::exists(files.eval)) step(job, files, evaluate(job, files));
      result["status"] = "passed";
    } catch (const Interrupted&) {
      result["status"] = "interrupted";
    } catch (const c10::Error& error) {
      result["status"] = "failed";
      result["error"] = error.what_without_backtrace();
    } catch (const fs::filesystem_error& error) {
      result["status"] = "failed";
      result["error"] = error.what();
    }
    add_results(result, files);
    return result;
  }

  json describe_job(const SweepJob& job) const {
    return {{"name", job.name},
            {"model", job.model},
            {"recipe", job.recipe.empty() ? json() : json(job.recipe)},
            {"set", job.overrides}};
  }

 private:
  bool evaluates() const { return !plan_.text.empty() || !plan_.tokens.empty(); }

  /// What the results of a job depend on. A result of other settings is never taken for one of these.
  void check_same_job(const SweepJob& job, const JobFiles& files) const {
    json settings = describe_job(job);
    settings["calibration"] = job.recipe.empty() ? "" : plan_.calibration;
    settings["seed"] = arguments_.common.seed;
    settings["device"] = arguments_.common.device;
    settings["evaluation"] = {{"text", plan_.text},
                              {"tokens", plan_.tokens},
                              {"seq_len", plan_.seq_len},
                              {"max_windows", plan_.max_windows},
                              {"reference", plan_.reference}};
    if (!job.recipe.empty()) settings["recipe_content"] = read_json_file(job.recipe);
    const bool begun = fs::exists(files.checkpoint) || fs::exists(files.work) || fs::exists(files.eval);
    if (begun) {
      TORCH_CHECK(fs::exists(files.job), files.checkpoint.string(), ": exists, but no sweep made it");
      TORCH_CHECK(read_json_file(files.job.string()) == settings, files.job.string(),
                  ": belongs to other settings of this job; remove ", files.checkpoint.string(), " and ",
                  files.checkpoint.string(), "-* to start over, or choose another output or name");
    } else {
      write_json_file(files.job, settings);
    }
  }

  std::vector<std::string> quantize(const SweepJob& job, const JobFiles& files) const {
    std::vector<std::string> words{"quantize",   job.model,
                                   "--recipe",   job.recipe,
                                   "--output",   files.checkpoint.string(),
                                   "--work",     files.work.string(),
                                   "--log-json", files.events.string(),
                                   "--json",     files.quantize.string()};
    if (!plan_.calibration.empty()) words.insert(words.end(), {"--calibration", plan_.calibration});
    for (const auto& [key, value] : job.overrides) words.insert(words.end(), {"--set", key + "=" + value.dump()});
    return with_common(std::move(words));
  }

  std::vector<std::string> resume(const JobFiles& files) const {
    return {"quantize",
            "--resume",
            files.work.string(),
            "--log-json",
            files.events.string(),
            "--json",
            files.quantize.string()};
  }

  std::vector<std::string> evaluate(const SweepJob& job, const JobFiles& files) const {
    const std::string model = job.recipe.empty() ? job.model : files.checkpoint.string();
    std::vector<std::string> words{
        "eval", model, "--seq-len", std::to_string(plan_.seq_len), "--json", files.eval.string()};
    words.insert(words.end(),
                 {plan_.text.empty() ? "--tokens" : "--text", plan_.text.empty() ? plan_.tokens : plan_.text});
    if (plan_.max_windows > 0) words.insert(words.end(), {"--max-windows", std::to_string(plan_.max_windows)});
    if (plan_.reference && !job.recipe.empty()) words.insert(words.end(), {"--reference", job.model});
    return with_common(std::move(words));
  }

  std::vector<std::string> with_common(std::vector<std::string> words) const {
    const CommonOptions& common = arguments_.common;
    words.insert(words.end(), {"--device", common.device, "--seed", std::to_string(common.seed)});
    if (common.threads > 0) words.insert(words.end(), {"--threads", std::to_string(common.threads)});
    return words;
  }

  void step(const SweepJob& job, const JobFiles& files, const std::vector<std::string>& words) const {
    if (!arguments_.common.quiet) spdlog::info("{}: {} (output in {})", job.name, words[0], files.log.string());
    const ChildStatus status = run_self(words, files.log);
    if (was_signalled()) throw Interrupted(job.name);
    TORCH_CHECK(status.success(), words[0], ": ", describe(status, files.log));
  }

  void add_results(json& result, const JobFiles& files) const {
    const auto take = [&](const fs::path& file, std::initializer_list<std::pair<const char*, const char*>> keys) {
      if (!fs::exists(file)) return;
      try {
        const json values = read_json_file(file.string());
        for (const auto& [from, to] : keys) {
          if (values.contains(from)) result[to] = values[from];
        }
      } catch (const c10::Error& error) {
        spdlog::warn("{}", error.what_without_backtrace());
      }
    };
    take(files.quantize,
         {{"seconds", "seconds"}, {"peak_memory_bytes", "peak_memory_bytes"}, {"output_bytes", "model_bytes"}});
    take(files.eval, {{"perplexity", "perplexity"},
                      {"mean_kl", "mean_kl"},
                      {"top1_agreement", "top1_agreement"},
                      {"model_bytes", "model_bytes"}});
  }

  const SweepPlan& plan_;
  const SweepArguments& arguments_;
};

std::string summary_table(const json& jobs) {
  std::vector<std::vector<std::string>> rows{
      {"job", "status", "perplexity", "mean KL", "top-1", "size", "time to quantize", "peak memory"}};
  const auto shown = [](const json& job, const char* key, auto format) {
    return job.contains(key) && job[key].is_number() ? format(job[key]) : std::string("-");
  };
  const auto bytes = [](const json& value) { return format_bytes(value.get<int64_t>()); };
  for (const json& job : jobs) {
    rows.push_back({job["name"].get<std::string>(), job["status"].get<std::string>(),
                    show_number(job.value("perplexity", json()), 3), show_number(job.value("mean_kl", json()), 4),
                    show_number(job.value("top1_agreement", json()), 1, 100, " %"), shown(job, "model_bytes", bytes),
                    shown(job, "seconds", [](const json& value) { return format_seconds(value.get<double>()); }),
                    shown(job, "peak_memory_bytes", bytes)});
  }
  constexpr size_t kTextColumns = 2;
  return markdown_table(rows, kTextColumns);
}

void run(const SweepArguments& arguments) {
  check_outputs(arguments.common);
  const SweepPlan plan = read_sweep_plan(arguments.file);
  const auto num_jobs = static_cast<int64_t>(plan.jobs.size());
  if (arguments.list) {
    for (int64_t i = 0; i < num_jobs; ++i) print_text("{} {}\n", i, plan.jobs[static_cast<size_t>(i)].name);
    return;
  }
  TORCH_CHECK(arguments.only < num_jobs, "--only ", arguments.only, ": ", arguments.file, " has jobs 0 to ",
              num_jobs - 1);
  const bool all = arguments.only < 0;
  const Sweep sweep(plan, arguments);
  forward_signals();
  json jobs = json::array();
  int64_t num_failed = 0;
  for (int64_t i = all ? 0 : arguments.only; i < (all ? num_jobs : arguments.only + 1) && !was_signalled(); ++i) {
    jobs.push_back(sweep.run(plan.jobs[static_cast<size_t>(i)]));
    const json& result = jobs.back();
    num_failed += result["status"] == "failed";
    if (result["status"] == "failed") {
      spdlog::error("{}: {}", result["name"].get<std::string>(), result["error"].get<std::string>());
    }
  }
  const std::string table = summary_table(jobs);
  print_text("{}", table);
  if (all) {
    write_json_file(plan.output / "summary.json", {{"jobs", jobs}});
    write_output_file(plan.output / "summary.md", table);
  }
  write_json(arguments.common, {{"jobs", jobs}});
  if (was_signalled()) throw Interrupted("stopped; the same command goes on");
  TORCH_CHECK(num_failed == 0, num_failed, " of ", jobs.size(), " jobs failed; the same command tries them again");
}

}  // namespace

void add_sweep(CLI::App& app) {
  auto arguments = std::make_shared<SweepArguments>();
  CLI::App* command = app.add_subcommand("sweep", "Quantize and evaluate several models with several recipes");
  command->add_option("file", arguments->file, "What to run, see docs/reports.md")
      ->required()
      ->check(CLI::ExistingFile);
  auto* only = command->add_option("--only", arguments->only, "Only the job of this index, from 0");
  only->check(CLI::Range(0, 1 << 30));
  command->add_flag("--list", arguments->list, "Print index and name of every job and stop")->excludes(only);
  add_common_options(*command, arguments->common);
  command->callback([arguments] { run(*arguments); });
}

}  // namespace baseq::cli
