#include "preflight.h"

#include <ATen/Parallel.h>
#include <fmt/format.h>

#include "baseq/pipeline/calibration.h"
#include "output_files.h"

namespace baseq::cli {
namespace {

/// Directory of the streams when they live on disk.
std::filesystem::path beside(const std::string& output) { return std::filesystem::absolute(output).parent_path(); }

QuantizeOptions options_of(const QuantizeArguments& arguments) {
  QuantizeOptions options;
  options.device = apply(arguments.common);
  options.seed = arguments.common.seed;
  options.output = {.shard_bytes = arguments.shard_megabytes << 20, .force = arguments.force};
  options.work_directory = arguments.work;
  if (arguments.activations == "disk") options.activations_directory = beside(arguments.output);
  return options;
}

/// Makes the run fit --memory and says how, or says what would be enough.
void fit(const QuantizeArguments& arguments, PreparedRun& prepared, std::vector<std::string>& problems) {
  QuantizeOptions& options = prepared.run.options;
  const Recipe& recipe = prepared.run.recipe;
  const Tensor& windows = prepared.run.windows;
  const int64_t num_windows = windows.defined() ? windows.size(0) : 0;
  const MemoryFit fit = fit_memory(*prepared.checkpoint, recipe, num_windows, windows.defined() ? windows.size(1) : 0,
                                   static_cast<int64_t>(arguments.memory));
  const std::string budget = format_bytes(static_cast<int64_t>(arguments.memory));
  if (!fit.choice) {
    problems.push_back(
        fmt::format("--memory {}: too little; at least {} are needed with activations on disk and {} tokens a batch{}",
                    budget, format_bytes(fit.smallest.bytes), fit.smallest.tokens_per_batch,
                    num_windows > 0 ? " (a smaller calibration.seq_len needs less)" : ""));
    return;
  }
  options.tokens_per_batch = fit.choice->tokens_per_batch;
  if (fit.choice->activations_on_disk) options.activations_directory = beside(arguments.output);
  prepared.memory_choice = fmt::format("--memory {}: activations {}, {} tokens a batch; about {} needed", budget,
                                       options.activations_directory.empty() ? "in memory" : "on disk",
                                       options.tokens_per_batch, format_bytes(fit.choice->bytes));
}

}  // namespace

Recipe read_recipe(const std::string& recipe, const std::vector<std::string>& overrides) {
  nlohmann::json json = read_recipe_json(recipe);
  for (const std::string& text : overrides) {
    const size_t equals = text.find('=');
    TORCH_CHECK(equals != std::string::npos, "--set ", text, ": expected KEY=VALUE");
    override_recipe(json, text.substr(0, equals), text.substr(equals + 1));
  }
  return Recipe::from_json(json, recipe);
}

void throw_problems(const std::vector<std::string>& problems) {
  TORCH_CHECK(problems.size() != 1, problems[0]);
  std::string list;
  for (const std::string& problem : problems) list += "\n  - " + problem;
  TORCH_CHECK(false, problems.size(), " problems:", list);
}

void check_quantize_outputs(const QuantizeArguments& arguments) {
  check_outputs(arguments.common, {{"--log-json", arguments.log, kEventsMark}});
}

PreparedRun prepare(const QuantizeArguments& arguments) {
  PreparedRun prepared;
  StoredRun& run = prepared.run;
  std::vector<std::string> problems;
  // What one step finds wrong does not keep the others from looking.
  const auto attempt = [&](const auto& step) {
    try {
      step();
      return true;
    } catch (const c10::Error& error) {
      problems.emplace_back(error.what_without_backtrace());
      return false;
    }
  };
  run.model = arguments.model;
  run.output = arguments.output;
  attempt([&] { run.options = options_of(arguments); });
  attempt([&] { check_quantize_outputs(arguments); });
  const bool has_recipe = attempt([&] { run.recipe = read_recipe(arguments.recipe, arguments.overrides); });
  attempt([&] { prepared.checkpoint = std::make_unique<Checkpoint>(run.model); });
  if (has_recipe) {
    attempt([&] {
      TORCH_CHECK(!arguments.calibration.empty() || !run.recipe.needs_calibration(), "recipe \"", run.recipe.name,
                  "\" needs calibration data: pass --calibration FILE");
      if (arguments.calibration.empty()) return;
      const Tensor windows = read_calibration(
          arguments.calibration, run.model / "tokenizer.json",
          {.num_samples = run.recipe.num_samples, .seq_len = run.recipe.seq_len, .seed = arguments.common.seed});
      const nlohmann::json known =
          prepared.checkpoint ? prepared.checkpoint->config().value("vocab_size", nlohmann::json()) : nlohmann::json();
      if (known.is_number_integer()) check_token_ids(windows, known.get<int64_t>(), arguments.calibration);
      run.windows = windows;
    });
  }
  if (has_recipe && prepared.checkpoint) {
    if (arguments.memory > 0) attempt([&] { fit(arguments, prepared, problems); });
    attempt([&] { prepared.plan = plan_run(*prepared.checkpoint, run.recipe, run.windows, run.output, run.options); });
    problems.insert(problems.end(), prepared.plan.problems.begin(), prepared.plan.problems.end());
  }
  if (!problems.empty()) throw_problems(problems);
  return prepared;
}

void print_plan(const QuantizeArguments& arguments, const PreparedRun& prepared, double seconds) {
  const RunPlan& plan = prepared.plan;
  print_text("{}: {} blocks, nothing found that would stop this run\n", prepared.run.model.string(), plan.num_blocks);
  print_text("  memory  {}, estimated\n", format_bytes(plan.memory.bytes()));
  nlohmann::json memory = nlohmann::json::object(), disk = nlohmann::json::object();
  for (const auto& [what, bytes] : plan.memory.parts) {
    print_text("    {:<46} {}\n", what, format_bytes(bytes));
    memory[what] = bytes;
  }
  for (const auto& [directory, bytes] : plan.disk) {
    print_text("  disk    {} in {}\n", format_bytes(bytes), directory);
    disk[directory] = disk.value(directory, int64_t{0}) + bytes;
  }
  print_text("  threads {}\n", at::get_num_threads());
  print_text("  time    {}, {} times the first block, which was quantized with few windows\n", format_seconds(seconds),
             plan.num_blocks);
  write_json(arguments.common, {{"memory_bytes", plan.memory.bytes()},
                                {"memory", memory},
                                {"disk", disk},
                                {"seconds", seconds},
                                {"warnings", plan.warnings},
                                {"num_blocks", plan.num_blocks},
                                {"num_threads", at::get_num_threads()},
                                {"peak_memory_bytes", peak_memory_bytes()}});
}

}  // namespace baseq::cli
