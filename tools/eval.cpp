#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <chrono>
#include <memory>

#include "baseq/eval/evaluate.h"
#include "baseq/pipeline/calibration.h"
#include "commands.h"
#include "progress_display.h"

namespace baseq::cli {
namespace {

struct EvalArguments {
  CommonOptions common;
  std::string model, text, tokens, reference, logits;
  int64_t seq_len = 2048, max_windows = 0;
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

Tensor read_windows(const EvalArguments& arguments, const Checkpoint& checkpoint) {
  if (arguments.text.empty() && arguments.tokens.empty()) throw CLI::RequiredError("--text or --tokens");
  Tensor ids;
  if (arguments.text.empty()) {
    const SafetensorsFile file(arguments.tokens);
    TORCH_CHECK(file.contains("input_ids"), arguments.tokens, ": expected a tensor \"input_ids\"");
    ids = file.tensor("input_ids");
    TORCH_CHECK(at::isIntegralType(ids.scalar_type(), /*includeBool=*/false), arguments.tokens,
                ": expected input_ids of integers, got ", ids.scalar_type());
    ids = ids.to(at::kLong);
  } else {
    ids = tokenize_file(arguments.text, Tokenizer(checkpoint.path() / "tokenizer.json"));
  }
  return split_windows(ids, arguments.seq_len, arguments.max_windows);
}

void run(const EvalArguments& arguments) {
  const auto start = std::chrono::steady_clock::now();
  const at::Device device = apply(arguments.common);
  const Checkpoint checkpoint(arguments.model);
  const Model model(checkpoint, {.device = device});
  std::optional<Checkpoint> reference_checkpoint;
  std::optional<Model> reference;
  if (!arguments.reference.empty()) {
    reference_checkpoint.emplace(arguments.reference);
    reference.emplace(*reference_checkpoint, Model::Options{.device = device});
  }
  const Tensor windows = read_windows(arguments, checkpoint);
  const std::filesystem::path activations = choose_activations(arguments, model.config(), windows);
  Evaluation result;
  {
    ProgressDisplay display(arguments.common.quiet);
    result = evaluate(model, windows, reference ? &*reference : nullptr,
                      {.activations_directory = activations, .progress = [&](int64_t done, int64_t total) {
                         release_free_memory();
                         display.step(done, total, "blocks");
                       }});
  }
  if (!arguments.logits.empty()) {
    save_safetensors(arguments.logits, {{"input_ids", windows}, {"logits", model.logits(windows).cpu()}});
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  nlohmann::json json{{"model", arguments.model},
                      {"perplexity", result.perplexity},
                      {"num_tokens", result.num_tokens},
                      {"num_windows", windows.size(0)},
                      {"seq_len", windows.size(1)},
                      {"mean_kl", nullptr},
                      {"top1_agreement", nullptr},
                      {"model_bytes", checkpoint.num_bytes()},
                      {"seconds", seconds},
                      {"peak_memory_bytes", peak_memory_bytes()}};
  fmt::print("{}\n  perplexity      {:.4f}\n", arguments.model, result.perplexity);
  if (reference) {
    fmt::print("  mean KL         {:.5f} nats\n  top-1 agreement {:.2f} %\n", result.mean_kl,
               100 * result.top1_agreement);
    json["mean_kl"] = result.mean_kl;
    json["top1_agreement"] = result.top1_agreement;
  }
  fmt::print("  tokens          {} in {} windows of {}\n  time            {}\n  peak memory     {}\n",
             result.num_tokens, windows.size(0), windows.size(1), format_seconds(seconds),
             format_bytes(peak_memory_bytes()));
  write_json(arguments.common, json);
}

}  // namespace

void add_eval(CLI::App& app) {
  auto arguments = std::make_shared<EvalArguments>();
  CLI::App* command = app.add_subcommand("eval", "Perplexity of a checkpoint, and its distance from a reference");
  command->add_option("model", arguments->model, "Checkpoint directory, or org/name in the local Hugging Face cache")
      ->required()
      ->transform(checkpoint_directory());
  auto* text = command->add_option("--text", arguments->text, "Text or .jsonl file")->check(CLI::ExistingFile);
  command->add_option("--tokens", arguments->tokens, ".safetensors file with input_ids")
      ->check(CLI::ExistingFile)
      ->excludes(text);
  command->add_option("--reference", arguments->reference, "Checkpoint to compare with: KL divergence, top-1 agreement")
      ->transform(checkpoint_directory());
  command->add_option("--logits", arguments->logits,
                      "Write input_ids and float32 logits [windows, tokens, vocabulary] to this .safetensors file");
  command->add_option("--seq-len", arguments->seq_len, "Tokens a window")
      ->capture_default_str()
      ->check(CLI::Range(2, 1 << 24));
  command
      ->add_option("--memory", arguments->memory,
                   "Budget such as 8G: hidden states go to mapped files in TMPDIR where it needs that")
      ->transform(CLI::AsSizeValue(/*kb_is_1000=*/false));
  command->add_option("--max-windows", arguments->max_windows, "Only the first N windows")
      ->check(CLI::Range(1, 1 << 30));
  add_common_options(*command, arguments->common);
  command->callback([arguments] { run(*arguments); });
}

}  // namespace baseq::cli
