#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <memory>

#include "baseq/io/json_object.h"
#include "baseq/pipeline/calibration.h"
#include "baseq/pipeline/quantize_checkpoint.h"
#include "commands.h"
#include "progress_display.h"

namespace baseq::cli {
namespace {

struct QuantizeArguments {
  CommonOptions common;
  std::string model, recipe, calibration, output, work, resume;
  std::string activations = "ram";
  std::vector<std::string> overrides;
  int64_t shard_megabytes = 4768;
  bool force = false;
};

Recipe read_recipe(const QuantizeArguments& arguments) {
  nlohmann::json json = read_json_file(arguments.recipe);
  for (const std::string& text : arguments.overrides) {
    const size_t equals = text.find('=');
    TORCH_CHECK(equals != std::string::npos, "--set ", text, ": expected KEY=VALUE");
    override_recipe(json, text.substr(0, equals), text.substr(equals + 1));
  }
  return Recipe::from_json(json, arguments.recipe);
}

/// What --json reports of the blocks, gathered from the events of the run.
void record(const ProgressEvent& event, nlohmann::json& blocks) {
  if (const auto* linear = std::get_if<LinearRounded>(&event)) {
    blocks.back()["linears"].push_back({{"name", linear->name},
                                        {"relative_error", linear->relative_error},
                                        {"damping", linear->damping},
                                        {"seconds", linear->seconds}});
  } else if (const auto* stage = std::get_if<StageLearned>(&event)) {
    blocks.back()["stages"].push_back({{"name", stage->stage},
                                       {"loss_before", stage->loss_before},
                                       {"loss_after", stage->loss_after},
                                       {"seconds", stage->seconds}});
  } else if (const auto* block = std::get_if<BlockFinished>(&event)) {
    blocks.back()["relative_error"] = block->relative_error;
    blocks.back()["seconds"] = block->seconds;
  } else if (std::holds_alternative<BlockStarted>(event)) {
    blocks.push_back({{"linears", nlohmann::json::array()}, {"stages", nlohmann::json::array()}});
  }
}

/// The run that the command line describes.
StoredRun new_run(const QuantizeArguments& arguments) {
  StoredRun run{.model = arguments.model, .output = arguments.output, .recipe = read_recipe(arguments), .windows = {}};
  QuantizeOptions& options = run.options;
  options.device = apply(arguments.common);
  options.seed = arguments.common.seed;
  options.output = {.shard_bytes = arguments.shard_megabytes << 20, .force = arguments.force};
  options.work_directory = arguments.work;
  if (arguments.activations == "disk") {
    options.activations_directory = std::filesystem::absolute(arguments.output).parent_path();
    std::filesystem::create_directories(options.activations_directory);
  }
  TORCH_CHECK(!arguments.calibration.empty() || !run.recipe.needs_calibration(), "recipe \"", run.recipe.name,
              "\" needs calibration data: pass --calibration FILE");
  if (!arguments.calibration.empty()) {
    run.windows = read_calibration(
        arguments.calibration, run.model / "tokenizer.json",
        {.num_samples = run.recipe.num_samples, .seq_len = run.recipe.seq_len, .seed = arguments.common.seed});
  }
  return run;
}

/// The run of --resume, with what it was started with.
StoredRun stored_run(const QuantizeArguments& arguments) {
  StoredRun run = read_stored_run(arguments.resume);
  CommonOptions common = arguments.common;
  common.threads = static_cast<int>(run.num_threads);
  common.device = run.options.device.str();
  apply(common);
  return run;
}

std::atomic<bool> stop_requested{false};

/// The first signal asks the run to stop where it can be continued, the second ends the process.
void request_stop(int signal) {
  stop_requested = true;
  std::signal(signal, SIG_DFL);
}

void run(const QuantizeArguments& arguments) {
  const auto start = std::chrono::steady_clock::now();
  if (arguments.resume.empty()) {
    TORCH_CHECK(arguments.force || !std::filesystem::exists(arguments.output), arguments.output,
                ": exists; pass --force to replace it");
  }
  auto [model, output, recipe, windows, options, num_threads] =
      arguments.resume.empty() ? new_run(arguments) : stored_run(arguments);
  const Checkpoint checkpoint(model);
  if (!options.work_directory.empty()) {
    std::signal(SIGINT, request_stop);
    std::signal(SIGTERM, request_stop);
    options.should_stop = [] { return stop_requested.load(); };
  }
  nlohmann::json blocks = nlohmann::json::array();
  {
    ProgressDisplay display(arguments.common.quiet);
    options.progress = [&](const ProgressEvent& event) {
      display.show(event);
      record(event, blocks);
    };
    try {
      quantize_checkpoint(checkpoint, recipe, windows, output, options);
    } catch (const Interrupted& interrupted) {
      throw Interrupted(fmt::format("{}; continue with: baseq quantize --resume {}", interrupted.what(),
                                    options.work_directory.string()));
    }
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const int64_t bytes = Checkpoint(output).num_bytes();
  fmt::print("{}\n  recipe       {}\n  size         {} (original {})\n  time         {}\n  peak memory  {}\n",
             output.string(), recipe.name, format_bytes(bytes), format_bytes(checkpoint.num_bytes()),
             format_seconds(seconds), format_bytes(peak_memory_bytes()));
  if (!options.work_directory.empty()) {
    spdlog::info("{} is no longer needed", options.work_directory.string());
  }
  write_json(arguments.common, {{"recipe", recipe.to_json()},
                                {"seconds", seconds},
                                {"peak_memory_bytes", peak_memory_bytes()},
                                {"output_bytes", bytes},
                                {"blocks", blocks}});
}

}  // namespace

void add_quantize(CLI::App& app) {
  auto arguments = std::make_shared<QuantizeArguments>();
  CLI::App* command = app.add_subcommand("quantize", "Quantize a Hugging Face checkpoint");
  command->add_option("model", arguments->model, "Checkpoint directory, or org/name in the local Hugging Face cache")
      ->transform(checkpoint_directory());
  command->add_option("--recipe", arguments->recipe, "Recipe file, see configs/")->check(CLI::ExistingFile);
  command
      ->add_option("--calibration", arguments->calibration,
                   "Text, .jsonl with \"text\", or .safetensors with input_ids")
      ->check(CLI::ExistingFile);
  command->add_option("--output", arguments->output, "Directory of the quantized checkpoint");
  command->add_option(
      "--work", arguments->work,
      "Keep finished blocks in this directory; the same command again, or --resume, goes on from there");
  CLI::Option* resume = command->add_option("--resume", arguments->resume, "Go on with the run of this work directory");
  resume->check(CLI::ExistingDirectory);
  command->add_option("--set", arguments->overrides, "Override a recipe value: weights.num_bits=3");
  command->add_option("--shard-size", arguments->shard_megabytes, "Largest shard in MiB")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 20));
  command
      ->add_option("--activations", arguments->activations,
                   "Where the activation streams live: ram, or disk (mapped files beside the output)")
      ->capture_default_str()
      ->check(CLI::IsMember({"ram", "disk"}));
  command->add_flag("--force", arguments->force, "Replace an existing output directory");
  add_common_options(*command, arguments->common);
  // A run goes on as it was started.
  for (const char* other : {"model", "--recipe", "--calibration", "--output", "--work", "--set", "--shard-size",
                            "--activations", "--force", "--device", "--threads", "--seed"}) {
    resume->excludes(command->get_option(other));
  }
  command->callback([arguments] {
    if (arguments->resume.empty()) {
      if (arguments->model.empty()) throw CLI::RequiredError("model");
      if (arguments->recipe.empty()) throw CLI::RequiredError("--recipe");
      if (arguments->output.empty()) throw CLI::RequiredError("--output");
    }
    run(*arguments);
  });
}

}  // namespace baseq::cli
