#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <chrono>
#include <memory>

#include "baseq/pipeline/job.h"
#include "commands.h"
#include "defaults.h"
#include "event_log.h"
#include "help.h"
#include "next_step.h"
#include "output_files.h"
#include "pipeline/run_log.h"
#include "preflight.h"
#include "progress_display.h"
#include "started_processes.h"
#include "stop_signals.h"

namespace baseq::cli {
namespace {

/// What --json reports of the blocks, those that an earlier process finished included.
nlohmann::json describe_blocks(const RunRecord& record) {
  nlohmann::json blocks = nlohmann::json::array();
  for (const auto& [index, block] : record.blocks) {
    nlohmann::json linears = nlohmann::json::array(), stages = nlohmann::json::array();
    for (const LinearRounded& linear : block.linears) {
      linears.push_back({{"name", linear.name},
                         {"relative_error", linear.relative_error},
                         {"damping", linear.damping},
                         {"seconds", linear.seconds}});
    }
    for (const StageLearned& stage : block.stages) {
      stages.push_back({{"name", stage.stage},
                        {"loss_before", stage.loss_before},
                        {"loss_after", stage.loss_after},
                        {"seconds", stage.seconds}});
    }
    blocks.push_back({{"linears", linears}, {"stages", stages}});
    if (block.finished) {
      blocks.back()["relative_error"] = block.finished->relative_error;
      blocks.back()["seconds"] = block.finished->seconds;
    }
  }
  return blocks;
}

/// The run of --resume, with what it was started with.
PreparedRun stored_run(const QuantizeArguments& arguments) {
  check_quantize_outputs(arguments);
  StoredRun stored = read_stored_run(arguments.resume);
  const std::filesystem::path& output = stored.job.output;
  const bool taken = std::filesystem::exists(output) && !std::filesystem::is_empty(output);
  TORCH_CHECK(stored.job.options.output.force || !taken, "--resume ", arguments.resume, ": ", output.string(),
              " exists. If it is the result of this run, ", arguments.resume, " is no longer needed; move ",
              output.string(), " away to have it written again");
  CommonOptions common = arguments.common;
  common.threads = static_cast<int>(stored.num_threads);
  common.device = stored.job.options.device.str();
  apply(common);
  stored.job.options.communicator = arguments.processes;
  return {.job = std::move(stored.job)};
}

void say(const QuantizeArguments& arguments, const PreparedRun& prepared) {
  if (find_built_in_recipe(arguments.recipe) != nullptr && std::filesystem::is_regular_file(arguments.recipe)) {
    spdlog::warn("{} is the built-in recipe; --recipe ./{} reads the file of that name", arguments.recipe,
                 arguments.recipe);
  }
  for (const std::string& warning : prepared.plan.warnings) spdlog::warn("{}", warning);
  if (arguments.common.quiet) return;
  for (const std::string& choice : prepared.defaults) spdlog::info("{}", choice);
  for (const CalibrationRead& read : prepared.calibration) spdlog::info("{}", describe_read(read));
  if (!prepared.memory_choice.empty()) spdlog::info("{}", prepared.memory_choice);
}

/// What a process does that is not the first one of its run: it works, and reports nothing.
void work_along(QuantizeArguments arguments) {
  if (arguments.dry_run) return;
  arguments.common.json = arguments.log = "";
  const Job job = (arguments.resume.empty() ? prepare(arguments) : stored_run(arguments)).job;
  const std::filesystem::path& activations = job.options.activations_directory;
  if (!activations.empty()) std::filesystem::create_directories(activations);
  quantize(job);
}

void run(QuantizeArguments arguments) {
  const auto start = std::chrono::steady_clock::now();
  return_freed_memory(kLargestPiece);
  arguments.processes = started_processes();
  if (!arguments.processes.is_first()) return work_along(arguments);
  PreparedRun prepared = arguments.resume.empty() ? prepare(arguments) : stored_run(arguments);
  Job& job = prepared.job;
  QuantizeOptions& options = job.options;
  if (!arguments.dry_run) {
    // Also without a work directory: a run that is asked to stop removes what it wrote.
    catch_stop_signals();
    options.should_stop = stop_requested;
  }
  say(arguments, prepared);
  if (arguments.dry_run) {
    print_plan(arguments, prepared, estimate_seconds(job));
    say_next(arguments.common.quiet, "the same command without --dry-run");
    return;
  }
  if (!options.activations_directory.empty()) std::filesystem::create_directories(options.activations_directory);
  EventLog log(arguments.log);
  {
    ProgressDisplay display(arguments.common.quiet);
    job.progress = [&](const ProgressEvent& event) {
      display.show(event);
      log.write(event);
      if (std::holds_alternative<BlockFinished>(event)) release_free_memory();
    };
    try {
      quantize(job);
    } catch (const Interrupted& interrupted) {
      if (options.work_directory.empty()) throw;
      throw Interrupted(fmt::format("{}; continue with: baseq quantize --resume {}", interrupted.what(),
                                    options.work_directory.string()));
    }
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const Checkpoint original(std::get<std::filesystem::path>(job.model));
  const int64_t bytes = Checkpoint(job.output).num_bytes();
  const bool untied = job.recipe.rotates_residual() && original.config().value("tie_word_embeddings", false);
  print_text("{}\n  recipe       {}\n  size         {} (original {}{})\n  time         {}\n  peak memory  {}\n",
             job.output.string(), job.recipe.name, format_bytes(bytes), format_bytes(original.num_bytes()),
             untied ? "; once rotated, head and embedding differ and are both stored" : "", format_seconds(seconds),
             format_bytes(peak_memory_bytes()));
  if (!options.work_directory.empty() && !arguments.common.quiet) {
    spdlog::info("{} is no longer needed", options.work_directory.string());
  }
  write_json(arguments.common, {{"recipe", job.recipe.to_json()},
                                {"calibration", json_of_reads(prepared.calibration)},
                                {"seconds", seconds},
                                {"peak_memory_bytes", peak_memory_bytes()},
                                {"output_bytes", bytes},
                                {"blocks", describe_blocks(read_run_log(job.output / kRunLogFile))}});
  const std::string output = shell_word(job.output.string());
  say_next(arguments.common.quiet,
           "baseq generate {} \"Once upon a time\"  or  baseq eval {} --text FILE --reference {}", output, output,
           shell_word(std::get<std::filesystem::path>(job.model).string()));
}

}  // namespace

void add_quantize(CLI::App& app) {
  auto arguments = std::make_shared<QuantizeArguments>();
  CLI::App* command = app.add_subcommand("quantize", "Quantize a Hugging Face checkpoint");
  command->add_option("model", arguments->model, "Checkpoint directory, or org/name in the local Hugging Face cache")
      ->transform(checkpoint_directory());
  begin_group(*command, "Method and data");
  command
      ->add_option(
          "--recipe", arguments->recipe,
          fmt::format("Name of a built-in recipe (baseq recipes lists them), or a file (default: {})", kDefaultRecipe))
      ->transform(recipe_name());
  command
      ->add_option("--set", arguments->overrides,
                   "Override a value of the recipe: grids.weights.num_bits=3, steps.0.method=rtn; may be repeated")
      ->type_name("KEY=VALUE");
  add_calibration_options(*command, arguments->calibration);
  begin_group(*command, "Output");
  command->add_option("--output", arguments->output, "Directory of the quantized checkpoint (default: MODEL-RECIPE)")
      ->type_name("DIR");
  command->add_flag("--force", arguments->force, "Replace an existing output directory that baseq wrote");
  command->add_option("--shard-size", arguments->shard_megabytes, "Largest shard in MiB")
      ->type_name("MIB")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 20));
  command
      ->add_option("--log-json", arguments->log, "Append every event of the run to this file, one JSON object a line")
      ->transform(output_file());
  begin_group(*command, "Memory");
  command
      ->add_option("--activations", arguments->activations,
                   "Where the activation streams live: ram (default), or disk (mapped files beside the output)")
      ->check(CLI::IsMember({"ram", "disk"}));
  command
      ->add_option("--memory", arguments->memory,
                   "Budget such as 8G: chooses where the activation streams live and how many tokens go at a time; "
                   "gpu=40G is one of the memory of --device; both may be given")
      ->transform(memory_sizes())
      ->take_all()
      ->allow_extra_args(false)  // what follows may be the model
      ->excludes(command->get_option("--activations"));
  begin_group(*command, "Long runs");
  command->add_flag("--dry-run", arguments->dry_run,
                    "Only say what is wrong, and what memory, disk and time the run would take");
  command
      ->add_option("--work", arguments->work,
                   "Keep finished blocks in this directory; the same command again, or --resume, goes on from there")
      ->type_name("DIR");
  CLI::Option* resume =
      command->add_option("--resume", arguments->resume,
                          "Go on with the run of this work directory, as it was started; of the other options only "
                          "--log-json, --json and --quiet may be given");
  resume->check(CLI::ExistingDirectory);
  add_common_options(*command, arguments->common, {.device = true, .threads = true, .seed = true, .quiet = true});
  command->footer(
      "Examples:\n"
      "  baseq quantize MODEL\n"
      "  baseq quantize MODEL --recipe gptq-w4a16-g64 --calibration text.txt --output out\n"
      "  baseq quantize MODEL --recipe rtn-w4a16 --set grids.weights.group_size=32 --output out\n"
      "  baseq quantize MODEL --recipe baseq-w4a4kv4 --calibration text.txt --output out --dry-run");
  // A run goes on as it was started.
  for (const char* other :
       {"model", "--recipe", "--calibration", "--calibration-split", "--output", "--work", "--set", "--shard-size",
        "--activations", "--memory", "--force", "--dry-run", "--device", "--threads", "--seed"}) {
    resume->excludes(command->get_option(other));
  }
  command->callback([arguments] {
    if (arguments->resume.empty()) {
      if (arguments->model.empty()) throw CLI::RequiredError("model");
      if (arguments->recipe == "/dev/stdin" && arguments->output.empty()) throw CLI::RequiredError("--output");
    }
    run(*arguments);
  });
}

}  // namespace baseq::cli
