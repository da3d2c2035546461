#include "preflight.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "defaults.h"
#include "output_files.h"

namespace baseq::cli {
namespace {

/// Directory of the streams when they live on disk.
std::filesystem::path beside(const std::string& output) { return std::filesystem::absolute(output).parent_path(); }

/// The last of the budgets that begin with `place`; 0: none.
int64_t budget(const QuantizeArguments& arguments, const std::string& place) {
  int64_t bytes = 0;
  for (const std::string& text : arguments.memory) {
    if (place.empty() ? text.find('=') == std::string::npos : text.starts_with(place))
      bytes = std::stoll(text.substr(place.size()));
  }
  return bytes;
}

QuantizeOptions options_of(const QuantizeArguments& arguments) {
  QuantizeOptions options;
  options.device = apply(arguments.common);
  options.seed = arguments.common.seed;
  options.output = {.shard_bytes = arguments.shard_megabytes << 20, .force = arguments.force};
  options.work_directory = arguments.work;
  options.communicator = arguments.processes;
  if (arguments.activations == "disk") options.activations_directory = beside(arguments.output);
  options.device_memory = budget(arguments, kGpuMemory);
  TORCH_CHECK(options.device_memory == 0 || !options.device.is_cpu(), "--memory ", kGpuMemory,
              format_bytes(options.device_memory), ": the run is on the CPU; pass --device cuda");
  return options;
}

/// Makes the run fit --memory and says how, or says what would be enough.
void fit(const QuantizeArguments& arguments, PreparedRun& prepared) {
  QuantizeOptions& options = prepared.job.options;
  const int64_t bytes = budget(arguments, "");
  const MemoryFit fit = fit_memory(prepared.job, bytes);
  const std::string given = format_bytes(bytes);
  TORCH_CHECK(
      fit.choice.has_value(),
      fmt::format("--memory {}: too little; at least {} are needed with activations on disk and {} tokens a batch{}",
                  given, format_bytes(fit.smallest.bytes), fit.smallest.tokens_per_batch,
                  prepared.job.windows.defined() ? " (a smaller calibration.seq_len needs less)" : ""));
  options.tokens_per_batch = fit.choice->tokens_per_batch;
  if (fit.choice->activations_on_disk) options.activations_directory = beside(arguments.output);
  prepared.memory_choice = fmt::format("--memory {}: activations {}, {} tokens a batch; about {} needed", given,
                                       options.activations_directory.empty() ? "in memory" : "on disk",
                                       options.tokens_per_batch, format_bytes(fit.choice->bytes));
}

/// The text that is installed with the program.
std::string default_calibration(const std::string& model, const Recipe& recipe) {
  TORCH_CHECK(
      std::filesystem::exists(std::filesystem::path(model) / "tokenizer.json"), "recipe \"", recipe.name,
      "\" needs calibration data, and ", model,
      " has no tokenizer.json for the text that is installed with baseq: pass token ids with --calibration FILE");
  try {
    return installed_file(kCalibrationText).string();
  } catch (const c10::Error& error) {
    TORCH_CHECK(false, error.what_without_backtrace(), "; pass a text with --calibration FILE");
  }
}

/// What the command line leaves to the program.
void choose_defaults(QuantizeArguments& arguments, std::vector<std::string>& said) {
  if (arguments.recipe.empty()) {
    arguments.recipe = kDefaultRecipe;
    said.push_back(fmt::format(
        "no --recipe: {}, rotated weights of 4 bits in groups of 64 (baseq recipes lists others)", kDefaultRecipe));
  }
  if (arguments.output.empty()) arguments.output = default_output(arguments.model, arguments.recipe);
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

PreparedRun prepare(QuantizeArguments arguments) {
  PreparedRun prepared;
  choose_defaults(arguments, prepared.defaults);
  Job& job = prepared.job;
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
  job.model = std::filesystem::path(arguments.model);
  job.output = arguments.output;
  attempt([&] { job.options = options_of(arguments); });
  attempt([&] { check_quantize_outputs(arguments); });
  const bool has_recipe = attempt([&] { job.recipe = read_recipe(arguments.recipe, arguments.overrides); });
  if (has_recipe) {
    const bool has_windows = attempt([&] {
      CalibrationArguments calibration = arguments.calibration;
      if (calibration.empty() && job.recipe.needs_calibration()) {
        calibration.files.push_back(default_calibration(arguments.model, job.recipe));
        prepared.defaults.push_back("no --calibration: windows of Wikipedia articles, installed with baseq");
      }
      if (calibration.empty()) return;
      CalibrationWindows read = read_calibration(calibration_data(calibration), job);
      job.windows = std::move(read.windows);
      prepared.calibration = std::move(read.files);
    });
    // The rest is looked at as if they were there.
    if (!has_windows) job.windows = at::zeros({job.recipe.num_samples, job.recipe.seq_len}, at::kLong);
    if (budget(arguments, "") > 0) attempt([&] { fit(arguments, prepared); });
    if (arguments.processes.is_first()) prepared.plan = plan(job);
  } else {
    attempt([&] { (void)Checkpoint(arguments.model); });
  }
  for (const std::string& problem : prepared.plan.problems) {
    if (std::find(problems.begin(), problems.end(), problem) == problems.end()) problems.push_back(problem);
  }
  if (!problems.empty()) throw_problems(problems);
  return prepared;
}

void print_plan(const QuantizeArguments& arguments, const PreparedRun& prepared, double seconds) {
  const RunPlan& plan = prepared.plan;
  print_text("{}: {} blocks, nothing found that would stop this run\n", arguments.model, plan.num_blocks);
  const int64_t processes = arguments.processes.size;
  print_text("  memory  {}{}, estimated\n", format_bytes(plan.memory.bytes()),
             processes > 1 ? fmt::format(" in each of {} processes", processes) : "");
  nlohmann::json memory = nlohmann::json::object(), disk = nlohmann::json::object();
  for (const auto& [what, bytes] : plan.memory.parts) {
    print_text("    {:<46} {}\n", what, format_bytes(bytes));
    memory[what] = bytes;
  }
  nlohmann::json device = nlohmann::json::object();
  if (!plan.device_memory.parts.empty()) {
    print_text("  {}  {}, estimated\n", arguments.common.device, format_bytes(plan.device_memory.bytes()));
  }
  for (const auto& [what, bytes] : plan.device_memory.parts) {
    print_text("    {:<46} {}\n", what, format_bytes(bytes));
    device[what] = bytes;
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
                                {"device_memory", device},
                                {"disk", disk},
                                {"seconds", seconds},
                                {"warnings", plan.warnings},
                                {"calibration", json_of_reads(prepared.calibration)},
                                {"num_blocks", plan.num_blocks},
                                {"num_threads", at::get_num_threads()},
                                {"peak_memory_bytes", peak_memory_bytes()}});
}

}  // namespace baseq::cli
