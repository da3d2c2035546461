#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <chrono>
#include <memory>

#include "baseq/pipeline/job.h"
#include "commands.h"
#include "eval/evaluation_memory.h"
#include "evaluation.h"
#include "help.h"
#include "next_step.h"
#include "output_files.h"
#include "started_processes.h"

namespace baseq::cli {
namespace {

struct EvalArguments {
  CommonOptions common;
  WindowOptions windows;
  LoadOptions load;
  std::string model, reference, logits;
  uint64_t memory = 0;  ///< bytes; 0: no limit
};

/// Where the hidden states live so that --memory suffices; says what it chose, throws when neither does.
std::filesystem::path choose_activations(const EvalArguments& arguments, const ModelConfig& config,
                                         const Tensor& windows) {
  if (arguments.memory == 0) return {};
  const auto needed = [&](bool on_disk) {
    return evaluation_memory(config, windows.size(0), windows.size(1), !arguments.reference.empty(), on_disk).bytes();
  };
  const auto budget = static_cast<int64_t>(arguments.memory);
  const bool on_disk = needed(false) > budget;
  TORCH_CHECK(!on_disk || needed(true) <= budget, "--memory ", format_bytes(budget), ": too little; at least ",
              format_bytes(needed(true)), " are needed with hidden states on disk (a smaller --seq-len needs less)");
  if (!arguments.common.quiet) {
    spdlog::info("--memory {}: hidden states {}; about {} needed", format_bytes(budget),
                 on_disk ? "on disk" : "in memory", format_bytes(needed(on_disk)));
  }
  return on_disk ? std::filesystem::temp_directory_path() : std::filesystem::path();
}

/// The file of --logits, which gets the windows now and the logits as they are computed.
std::unique_ptr<SafetensorsWriter> open_logits(const std::string& path, const Tensor& windows, int64_t vocab_size) {
  const std::map<std::string, TensorInfo> tensors = {
      {"input_ids", {windows.scalar_type(), windows.sizes().vec()}},
      {"logits", {at::kFloat, {windows.size(0), windows.size(1), vocab_size}}}};
  const std::map<std::string, std::string> metadata = {{"baseq", "logits"}, {"format", "pt"}};
  auto file = std::make_unique<SafetensorsWriter>(path, tensors, metadata);
  file->append("input_ids", windows);  // comes first: its elements are larger
  return file;
}

void run(EvalArguments arguments) {
  const auto start = std::chrono::steady_clock::now();
  if (arguments.windows.text.empty() && arguments.windows.tokens.empty()) {
    throw CLI::RequiredError("--text or --tokens");
  }
  const Communicator processes = started_processes(arguments.common);
  TORCH_CHECK(processes.size == 1 || arguments.logits.empty(), "--logits: is written by one process alone");
  const at::Device device = apply(arguments.common);
  const OutputFile output{"--logits", arguments.logits, kLogitsMark};
  check_outputs(arguments.common, {output});
  const Model model = opened(arguments.model, device);
  std::optional<Model> original;
  std::optional<Reference> reference;
  if (!arguments.reference.empty()) reference.emplace(Reference{original.emplace(opened(arguments.reference, device))});
  const Tensor windows = read_windows(arguments.windows, model.checkpoint());
  std::unique_ptr<SafetensorsWriter> logits;
  std::function<void(const Tensor&)> write_logits;
  if (!arguments.logits.empty()) {
    logits = open_logits(arguments.logits, windows, model.config().vocab_size);
    write_logits = [&](const Tensor& rows) { logits->append("logits", rows); };
  }
  nlohmann::json json = evaluate_model(arguments.model, model, windows,
                                       {.load = arguments.load,
                                        .reference = reference ? &*reference : nullptr,
                                        .activations_directory = choose_activations(arguments, model.config(), windows),
                                        .logits = write_logits,
                                        .quiet = arguments.common.quiet,
                                        .communicator = processes});
  if (logits) {
    check_output_file(output.option, output.path, output.mark);  // again: the work may have taken hours
    logits->commit();
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  json["seconds"] = seconds;
  json["peak_memory_bytes"] = peak_memory_bytes();
  print_text("{}\n  perplexity      {:.4f}\n", arguments.model, json["perplexity"].get<double>());
  if (reference) {
    print_text("  mean KL         {:.5f} nats\n  top-1 agreement {:.2f} %\n", json["mean_kl"].get<double>(),
               100 * json["top1_agreement"].get<double>());
  }
  print_text("  tokens          {} in {} windows of {}\n  time            {}\n  peak memory     {}\n",
             json["num_tokens"].get<int64_t>(), windows.size(0), windows.size(1), format_seconds(seconds),
             format_bytes(peak_memory_bytes()));
  write_json(arguments.common, json);
  check_finite(json);
  const std::string name = shell_word(arguments.model);
  if (!model.quantization()) {
    say_next(arguments.common.quiet, "baseq quantize {}", name);
  } else if (!reference) {
    say_next(arguments.common.quiet, "the same with --reference MODEL: the distance from the original model");
  } else {
    say_next(arguments.common.quiet, "baseq generate {} \"Once upon a time\"", name);
  }
}

}  // namespace

void add_eval(CLI::App& app) {
  auto arguments = std::make_shared<EvalArguments>();
  CLI::App* command = app.add_subcommand("eval", "Perplexity of a checkpoint, and its distance from a reference");
  command
      ->add_option("model", arguments->model,
                   "Checkpoint directory, GGUF file, or org/name in the local Hugging Face cache")
      ->required()
      ->transform(checkpoint_path());
  add_window_options(*command, arguments->windows);
  add_arithmetic_options(*command, arguments->load);
  begin_group(*command, "Comparison and output");
  command->add_option("--reference", arguments->reference, "Checkpoint to compare with: KL divergence, top-1 agreement")
      ->transform(checkpoint_path());
  command
      ->add_option("--logits", arguments->logits,
                   "Write input_ids and float32 logits [windows, tokens, vocabulary] to this .safetensors file")
      ->transform(output_file());
  begin_group(*command, "Memory");
  command
      ->add_option("--memory", arguments->memory,
                   "Budget such as 8G: hidden states go to mapped files in TMPDIR where it needs that")
      ->transform(memory_size());
  add_common_options(*command, arguments->common, {.device = true, .threads = true, .quiet = true});
  command->footer(
      "Examples:\n"
      "  baseq eval out --text wikitext2-test.txt --max-windows 20 --reference MODEL\n"
      "  baseq eval out --tokens ids.safetensors --json out-eval.json");
  command->callback([arguments] { run(*arguments); });
}

}  // namespace baseq::cli
