#include <fmt/format.h>
#include <fmt/ranges.h>
#include <spdlog/spdlog.h>

#include <chrono>
#include <cstdio>
#include <memory>

#include "baseq/export/export_checkpoint.h"
#include "baseq/formats/open_model.h"
#include "baseq/pipeline/job.h"
#include "help.h"
#include "next_step.h"
#include "output_files.h"
#include "printable.h"
#include "progress_display.h"
#include "stop_signals.h"

namespace baseq::cli {
namespace {

const std::map<std::string, at::ScalarType> kDtypes = {
    {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}};

struct ExportArguments {
  CommonOptions common;
  std::string model, format, output, dtype, gguf_type = "Q4_0", gguf_head_type;
  int64_t shard_megabytes = 4768;
  bool dry_run = false, force = false;
};

nlohmann::json to_json(const ExportArguments& arguments, const ExportPlan& plan) {
  nlohmann::json tensors = nlohmann::json::array();
  for (const auto& [name, type, shape] : plan.exported_tensors()) {
    tensors.push_back({{"name", name}, {"dtype", type}, {"shape", shape}});
  }
  return {{"model", arguments.model},  {"format", arguments.format}, {"dry_run", arguments.dry_run},
          {"bytes", plan.num_bytes()}, {"config", plan.config},      {"tensors", tensors},
          {"notes", plan.notes},       {"warnings", plan.warnings}};
}

std::string next_after(const ExportArguments& arguments) {
  if (arguments.dry_run) return "the same command with --output in place of --dry-run";
  const std::string output = shell_word(arguments.output);
  if (arguments.format == "gguf") return fmt::format("llama-cli -m {} -p \"Once upon a time\"", output);
  if (arguments.format == "hf") return fmt::format("AutoModelForCausalLM.from_pretrained(\"{}\")", arguments.output);
  if (arguments.format == "peft")
    return fmt::format("PeftModel.from_pretrained(base, \"{}/adapter\")", arguments.output);
  return "vllm serve " + output;
}

void run(const ExportArguments& arguments) {
  const auto start = std::chrono::steady_clock::now();
  apply(arguments.common);
  check_outputs(arguments.common);
  return_freed_memory(1 << 20);
  if (arguments.output.empty() && !arguments.dry_run) throw CLI::RequiredError("--output or --dry-run");
  const StoredModel model = open_model(arguments.model);
  ExportOptions options{.format = export_format(arguments.format), .gguf_type = arguments.gguf_type};
  if (!arguments.gguf_head_type.empty()) options.gguf_head_type = arguments.gguf_head_type;
  if (!arguments.dtype.empty()) options.dtype = kDtypes.at(arguments.dtype);
  const ExportPlan plan = plan_export(model, options);
  const CheckpointWriter::Options output{.shard_bytes = arguments.shard_megabytes << 20, .force = arguments.force};
  if (!arguments.output.empty()) check_export_place(model.tensors, plan, arguments.output, output);
  for (const std::string& warning : plan.warnings) spdlog::warn("{}", warning);
  nlohmann::json report = to_json(arguments, plan);
  if (arguments.dry_run) {
    for (const auto& [name, type, shape] : plan.exported_tensors()) {
      print_text("  {:<60} {:<5} [{}]\n", name, type, fmt::join(shape, ", "));
    }
  } else {
    if (!arguments.common.quiet) {
      for (const std::string& note : plan.notes) std::fputs((printable(note) + "\n").c_str(), stderr);
    }
    ProgressDisplay display(arguments.common.quiet);
    catch_stop_signals();
    write_export(model.tensors, plan, arguments.output, output, [&](int64_t done, int64_t total) {
      if (stop_requested()) throw Interrupted("stopped; nothing of " + arguments.output + " is left");
      display.step(done, total, "tensors");
    });
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  // A file of its own also holds the vocabulary.
  const bool is_file = !arguments.dry_run && std::filesystem::is_regular_file(arguments.output);
  const int64_t bytes = is_file ? static_cast<int64_t>(std::filesystem::file_size(arguments.output)) : plan.num_bytes();
  print_text("{}\n  format       {}\n  size         {} in {} tensors\n", arguments.dry_run ? "plan" : arguments.output,
             arguments.format, format_bytes(bytes), plan.tensors.size());
  for (const std::string& note : plan.notes) print_text("  note         {}\n", note);
  if (!arguments.dry_run) {
    print_text("  time         {}\n  peak memory  {}\n", format_seconds(seconds), format_bytes(peak_memory_bytes()));
  }
  report["seconds"] = seconds;
  report["peak_memory_bytes"] = peak_memory_bytes();
  write_json(arguments.common, report);
  say_next(arguments.common.quiet, "{}", next_after(arguments));
}

}  // namespace

void add_export(CLI::App& app) {
  auto arguments = std::make_shared<ExportArguments>();
  CLI::App* command = app.add_subcommand("export", "Turn a quantized checkpoint into a format that others load");
  command
      ->add_option("model", arguments->model,
                   "Checkpoint directory, GGUF file, or org/name in the local Hugging Face cache")
      ->required()
      ->transform(checkpoint_path());
  begin_group(*command, "Format");
  command->add_option("--format", arguments->format, "What to write, see docs/export.md")
      ->required()
      ->check(CLI::IsMember({"hf", "compressed-tensors", "gptq", "awq", "peft", "gguf"}));
  command->add_option("--gguf-type", arguments->gguf_type, "Type of the linears, with --format gguf")
      ->capture_default_str()
      ->check(CLI::IsMember({"F16", "Q8_0", "Q4_0", "Q4_1"}));
  command
      ->add_option("--gguf-head-type", arguments->gguf_head_type,
                   "Type of embedding and head, with --format gguf (default: Q8_0 beside quantized linears)")
      ->check(CLI::IsMember({"F16", "Q8_0"}));
  command
      ->add_option("--dtype", arguments->dtype,
                   "Of what stays in floating point, with other formats than gguf (default: float16 for gptq and awq, "
                   "else bfloat16)")
      ->check(CLI::IsMember(kDtypes));
  begin_group(*command, "Output");
  command
      ->add_option("--output", arguments->output,
                   "Directory of the export, with gguf the file; required unless --dry-run")
      ->type_name("PATH");
  command->add_option("--shard-size", arguments->shard_megabytes, "Largest shard in MiB, with other formats than gguf")
      ->type_name("MIB")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 20));
  command->add_flag("--dry-run", arguments->dry_run, "Check and list what would be written, write nothing");
  command->add_flag("--force", arguments->force, "Replace an existing output that baseq wrote");
  add_common_options(*command, arguments->common, {.threads = true, .quiet = true});
  command->footer(
      "Examples:\n"
      "  baseq export out --format compressed-tensors --output out-vllm\n"
      "  baseq export out --format gguf --gguf-type Q4_0 --output out.gguf");
  command->callback([arguments, command] {
    const bool gguf = arguments->format == "gguf";
    for (const char* option : {"--gguf-type", "--gguf-head-type", "--dtype", "--shard-size"}) {
      const bool of_gguf = std::string_view(option).starts_with("--gguf");
      if (command->count(option) == 0 || of_gguf == gguf) continue;
      throw CLI::ValidationError(option, of_gguf ? "only --format gguf has types" : "not with --format gguf");
    }
    run(*arguments);
  });
}

}  // namespace baseq::cli
