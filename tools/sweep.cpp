#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <fstream>
#include <iterator>
#include <memory>
#include <sstream>
#include <thread>

#include "baseq/pipeline/job.h"
#include "child_process.h"
#include "commands.h"
#include "evaluation.h"
#include "help.h"
#include "io/json_object.h"
#include "io/lock_file.h"
#include "io/run_journal.h"
#include "next_step.h"
#include "output_files.h"
#include "preflight.h"
#include "stop_signals.h"
#include "sweep_plan.h"
#include "text_table.h"

namespace baseq::cli {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

struct SweepArguments {
  CommonOptions common;
  std::string file;
  int64_t only = -1, parallel = 1;
  std::string launch;
  bool list = false;
};

/// The files of one job, all beside each other in the output directory.
struct JobFiles {
  fs::path checkpoint, work, job, quantize, eval, events, log, lock;

  JobFiles(const fs::path& output, const std::string& name)
      : checkpoint(output / name),
        work(output / (name + "-work")),
        job(output / (name + "-job.json")),
        quantize(output / (name + "-quantize.json")),
        eval(output / (name + "-eval.json")),
        events(output / (name + "-log.jsonl")),
        log(output / (name + "-output.txt")),
        lock(output / ("." + name + "-lock")) {}
};

/// The error that a process printed, all of its lines, or else the last line.
/// @param begin  where in the file it began to print
std::string error_in(const fs::path& file, std::streamoff begin) {
  constexpr std::string_view kError = "error: ";
  std::ifstream stream(file);
  stream.seekg(begin);
  std::string line, last;
  bool within = false;
  while (std::getline(stream, line)) {
    if (line.empty()) continue;
    const bool starts = line.starts_with(kError);
    last = within && !starts ? last + "\n" + line : line.substr(starts ? kError.size() : 0);
    within = within || starts;
  }
  return last;
}

std::string describe(const ChildStatus& status, const fs::path& log, std::streamoff begin) {
  if (status.signal == SIGKILL) return "killed (out of memory?)";
  if (status.signal != 0) return fmt::format("ended by signal {}", status.signal);
  return error_in(log, begin);
}

/// One sweep in its output directory.
class Sweep {
 public:
  /// Throws c10::Error when another process works on one of the jobs.
  Sweep(const SweepPlan& plan, const SweepArguments& arguments, const std::vector<SweepJob>& jobs)
      : plan_(plan), arguments_(arguments) {
    std::istringstream words(arguments.launch);
    launcher_.assign(std::istream_iterator<std::string>(words), {});
    fs::create_directories(plan.output);
    try {
      for (const SweepJob& job : jobs) {
        const fs::path lock = JobFiles(plan.output, job.name).lock;
        locks_.emplace_back("sweep", lock, "another process works on " + job.name + " in " + plan.output.string());
      }
    } catch (const c10::Error&) {
      remove_locks();
      throw;
    }
  }
  ~Sweep() { remove_locks(); }
  Sweep(const Sweep&) = delete;
  Sweep& operator=(const Sweep&) = delete;

  /// What the job came to: "status" is "passed", "failed" or "interrupted"; what is there already is not made again.
  json run(const SweepJob& job) const {
    const JobFiles files(plan_.output, job.name);
    json result = describe_job(job);
    bool same = false;
    try {
      check_same_job(job, files);
      same = true;
      if (!job.recipe.empty() && !fs::exists(files.checkpoint)) {
        step(job, files, fs::exists(files.work / "run.json") ? resume(files) : quantize(job, files));
      }
      std::error_code ignored;
      if (!job.recipe.empty() && RunJournal::exists(files.work)) fs::remove_all(files.work, ignored);
      if (evaluates() && !fs::exists(files.eval)) step(job, files, evaluate(job, files));
      if (evaluates()) check_finite(read_json_file(files.eval.string()));  // also one of an earlier sweep
      result["status"] = "passed";
    } catch (const Interrupted&) {
      result["status"] = "interrupted";
    } catch (const c10::Error& error) {
      result["status"] = "failed";
      result["error"] = error.what_without_backtrace();
    } catch (const std::exception& error) {  // of the file system, of JSON, out of memory: the other jobs go on
      result["status"] = "failed";
      result["error"] = error.what();
    }
    if (same) add_results(result, files);  // else what is there belongs to other settings
    return result;
  }

  /// Whether run() would find nothing to do.
  static bool is_finished(const SweepPlan& plan, const SweepJob& job) {
    const JobFiles files(plan.output, job.name);
    const bool evaluated = (plan.text.empty() && plan.tokens.empty()) || fs::exists(files.eval);
    return evaluated && (job.recipe.empty() || fs::exists(files.checkpoint));
  }

  json describe_job(const SweepJob& job) const {
    return {{"name", job.name},
            {"model", job.model},
            {"recipe", job.recipe.empty() ? json() : json(job.recipe)},
            {"set", job.overrides}};
  }

 private:
  void remove_locks() {
    for (LockFile& lock : locks_) lock.remove();
  }

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
    if (!job.recipe.empty()) settings["recipe_content"] = read_recipe_json(job.recipe);
    const bool begun = fs::exists(files.checkpoint) || fs::exists(files.work) || fs::exists(files.eval);
    if (begun) {
      TORCH_CHECK(fs::exists(files.job), files.checkpoint.string(), ": exists, but no sweep made it");
      json was = read_json_file(files.job.string());
      if (was == settings) return;
      const bool same_evaluation = was.value("evaluation", json()) == settings["evaluation"];
      was["evaluation"] = settings["evaluation"];
      TORCH_CHECK(was == settings, files.job.string(), ": belongs to other settings of this job; remove ",
                  files.checkpoint.string(), " and ", files.checkpoint.string(),
                  "-* to start over, or choose another output or name");
      TORCH_CHECK(same_evaluation || !fs::exists(files.eval), files.eval.string(),
                  ": belongs to another evaluation; remove it to evaluate again, what is quantized stays");
    }
    write_json_file(files.job, settings);
  }

  // Values are one word with their option, and the model comes last, after "--": any of them may begin with a dash.
  std::vector<std::string> quantize(const SweepJob& job, const JobFiles& files) const {
    std::vector<std::string> words{"quantize",
                                   "--recipe=" + job.recipe,
                                   "--output=" + files.checkpoint.string(),
                                   "--work=" + files.work.string(),
                                   "--log-json=" + files.events.string(),
                                   "--json=" + files.quantize.string()};
    if (!plan_.calibration.empty()) words.push_back("--calibration=" + plan_.calibration);
    for (const std::string& setting : job.settings()) words.push_back("--set=" + setting);
    words.push_back("--seed=" + std::to_string(arguments_.common.seed));
    return with_common(std::move(words), job.model);
  }

  std::vector<std::string> resume(const JobFiles& files) const {
    return {"quantize", "--resume=" + files.work.string(), "--log-json=" + files.events.string(),
            "--json=" + files.quantize.string()};
  }

  std::vector<std::string> evaluate(const SweepJob& job, const JobFiles& files) const {
    std::vector<std::string> words{"eval", "--seq-len=" + std::to_string(plan_.seq_len),
                                   "--json=" + files.eval.string()};
    words.push_back(plan_.text.empty() ? "--tokens=" + plan_.tokens : "--text=" + plan_.text);
    if (plan_.max_windows > 0) words.push_back("--max-windows=" + std::to_string(plan_.max_windows));
    if (plan_.reference && !job.recipe.empty()) words.push_back("--reference=" + job.model);
    return with_common(std::move(words), job.recipe.empty() ? job.model : files.checkpoint.string());
  }

  std::vector<std::string> with_common(std::vector<std::string> words, const std::string& model) const {
    const CommonOptions& common = arguments_.common;
    words.push_back("--device=" + common.device);
    if (common.threads > 0) words.push_back("--threads=" + std::to_string(common.threads));
    words.insert(words.end(), {"--", model});
    return words;
  }

  void step(const SweepJob& job, const JobFiles& files, const std::vector<std::string>& words) const {
    if (!arguments_.common.quiet) spdlog::info("{}: {} (output in {})", job.name, words[0], files.log.string());
    std::error_code absent;
    const auto printed = static_cast<std::streamoff>(fs::exists(files.log, absent) ? fs::file_size(files.log) : 0);
    const ChildStatus status = run_self(words, files.log, launcher_);
    if (stop_requested()) throw Interrupted(job.name);
    TORCH_CHECK(status.success(), words[0], ": ", describe(status, files.log, printed));
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
  std::vector<std::string> launcher_;
  std::vector<LockFile> locks_;
};

/// The results of the jobs that were begun, in their order; up to `parallel` run at a time.
json run_jobs(const Sweep& sweep, const std::vector<SweepJob>& jobs, int64_t parallel) {
  std::vector<json> results(jobs.size());
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i = next++; i < jobs.size() && !stop_requested(); i = next++) {
      json& result = results[i];
      result = sweep.run(jobs[i]);
      if (result["status"] != "failed") continue;
      spdlog::error("{}: {}", result["name"].get<std::string>(), result["error"].get<std::string>());
    }
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < std::min(parallel, static_cast<int64_t>(jobs.size())); ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  json begun = json::array();
  for (json& result : results) {
    if (!result.is_null()) begun.push_back(std::move(result));
  }
  return begun;
}

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
  std::vector<SweepJob> chosen = plan.jobs;
  if (!all) chosen = {plan.jobs[static_cast<size_t>(arguments.only)]};
  std::vector<SweepJob> unfinished;
  std::copy_if(chosen.begin(), chosen.end(), std::back_inserter(unfinished),
               [&](const SweepJob& job) { return !Sweep::is_finished(plan, job); });
  const std::vector<std::string> problems = find_problems(plan, unfinished);
  if (!problems.empty()) throw_problems(problems);
  const Sweep sweep(plan, arguments, chosen);
  CommonOptions summary;
  summary.json = (plan.output / "summary.json").string();
  const fs::path summary_file = plan.output / "summary.md";
  if (all) check_outputs(summary, {{"the table", summary_file.string(), "| job"}});
  forward_signals_to_children();
  const json jobs = run_jobs(sweep, chosen, arguments.parallel);
  const int64_t num_failed = std::ranges::count(jobs, "failed", [](const json& job) { return job["status"]; });
  const std::string table = summary_table(jobs);
  print_text("{}", table);
  if (all) {
    write_json(summary, {{"jobs", jobs}});
    write_output_file(summary_file, table);
  }
  write_json(arguments.common, {{"jobs", jobs}});
  if (stop_requested()) throw Interrupted("stopped; the same command goes on");
  TORCH_CHECK(num_failed == 0, num_failed, " of ", jobs.size(), " jobs failed; the same command tries them again");
  const auto quantized = std::ranges::find_if(chosen, [](const SweepJob& job) { return !job.recipe.empty(); });
  if (quantized == chosen.end()) return;
  say_next(arguments.common.quiet, "baseq report {}", shell_word((plan.output / quantized->name).string()));
}

}  // namespace

void add_sweep(CLI::App& app) {
  auto arguments = std::make_shared<SweepArguments>();
  CLI::App* command = app.add_subcommand("sweep", "Quantize and evaluate several models with several recipes");
  command->add_option("file", arguments->file, "What to run, see docs/reports.md")
      ->required()
      ->check(CLI::ExistingFile);
  begin_group(*command, "Jobs");
  auto* only = command->add_option("--only", arguments->only, "Only the job of this index, from 0");
  only->check(CLI::Range(0, 1 << 30));
  command->add_option("--parallel", arguments->parallel, "So many jobs at a time, each with --threads")
      ->type_name("K")
      ->capture_default_str()
      ->check(CLI::Range(1, kMostChildren));
  command
      ->add_option("--launch", arguments->launch,
                   "Words before the command of each job, such as 'srun -n 1' to hand it to a scheduler")
      ->type_name("WORDS");
  command->add_flag("--list", arguments->list, "Print index and name of every job and stop")->excludes(only);
  add_common_options(*command, arguments->common, {.device = true, .threads = true, .seed = true, .quiet = true});
  command->footer(
      "Examples:\n  baseq sweep sweep.json --list\n  baseq sweep sweep.json\n"
      "  baseq sweep sweep.json --parallel 4 --launch 'srun -n 1'");
  command->callback([arguments] { run(*arguments); });
}

}  // namespace baseq::cli
