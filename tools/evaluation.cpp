#include "evaluation.h"

#include <spdlog/spdlog.h>

#include "baseq/tokenizer/token_windows.h"
#include "help.h"
#include "model/unused_tensors.h"
#include "progress_display.h"

namespace baseq::cli {

void add_window_options(CLI::App& command, WindowOptions& options) {
  begin_group(command, "Text");
  auto* text = command.add_option("--text", options.text, "Text or .jsonl file; - is stdin")->transform(input_file());
  command.add_option("--tokens", options.tokens, ".safetensors file with input_ids")
      ->transform(input_file())
      ->excludes(text);
  command.add_option("--tokenizer", options.tokenizer, "tokenizer.json for --text (default: the one of the model)")
      ->needs(text)
      ->check(CLI::ExistingFile);
  command.add_option("--seq-len", options.seq_len, "Tokens per window; the rest at the end is left out")
      ->capture_default_str()
      ->check(CLI::Range(2, 1 << 24));
  command.add_option("--max-windows", options.max_windows, "Only the first N windows")->check(CLI::Range(1, 1 << 30));
}

void add_arithmetic_options(CLI::App& command, LoadOptions& options) {
  begin_group(command, "Arithmetic of quantized checkpoints");
  const std::map<std::string, Arithmetic> names{{"integer", Arithmetic::kInteger}, {"float", Arithmetic::kFloat}};
  command
      .add_option("--arithmetic", options.arithmetic,
                  "integer: defined to the bit; float: products of dequantized weights")
      ->transform(CLI::CheckedTransformer(names).description("{integer,float}"))
      ->default_str("integer");
  command
      .add_option("--activation-bits", options.activation_bits,
                  "Bits of inputs that the checkpoint does not quantize, with integers")
      ->check(CLI::IsMember({8, 15}))
      ->capture_default_str();
}

void warn_of_unused(const Model& model) {
  for (const Unused& unused : find_unused(model)) {
    spdlog::warn("{}: {}", model.checkpoint().path().string(), unused.message());
  }
}

Model opened(const std::string& path, at::Device device) {
  Model model(open_model(path), {.device = device});
  warn_of_unused(model);
  return model;
}

Tensor read_windows(const WindowOptions& options, const Checkpoint& checkpoint) {
  Tensor ids;
  if (options.text.empty()) {
    ids = read_token_ids(options.tokens);
  } else {
    ids = tokenize_file(options.text,
                        options.tokenizer.empty() ? open_tokenizer(checkpoint.path()) : Tokenizer(options.tokenizer));
  }
  check_token_ids(ids, checkpoint.config().value("vocab_size", INT64_MAX),
                  options.text.empty() ? options.tokens : options.text);
  return split_windows(ids, options.seq_len, options.max_windows);
}

nlohmann::json evaluate_model(const std::string& name, const Model& model, const Tensor& windows,
                              const EvaluationContext& context) {
  // Where a matrix is as large as this, the product with it takes so much longer than new pages.
  const ModelConfig& config = model.config();
  if (config.hidden_size * config.intermediate_size * 4 >= kLargestPiece) return_freed_memory(kLargestPiece);
  if (config.max_position_embeddings > 0 && windows.size(1) > config.max_position_embeddings) {
    spdlog::warn("{}: windows of {} tokens, but the model was made for {}", name, windows.size(1),
                 config.max_position_embeddings);
  }
  Evaluation result;
  {
    ProgressDisplay display(context.quiet);
    const auto block_done = [&](int64_t done, int64_t total) {
      release_free_memory();
      display.step(done, total, "blocks");
    };
    result = evaluate(model, windows, context.reference,
                      {.load = context.load,
                       .activations_directory = context.activations_directory,
                       .progress = block_done,
                       .logits = context.logits,
                       .communicator = context.communicator});
  }
  nlohmann::json json{{"model", name},
                      {"perplexity", result.perplexity},
                      {"num_tokens", result.num_tokens},
                      {"num_windows", windows.size(0)},
                      {"seq_len", windows.size(1)},
                      {"mean_kl", nullptr},
                      {"top1_agreement", nullptr},
                      {"not_finite", nullptr},
                      {"model_bytes", model.checkpoint().num_bytes()}};
  if (context.reference) {
    json["mean_kl"] = result.mean_kl;
    json["top1_agreement"] = result.top1_agreement;
  }
  if (!result.not_finite.empty()) {
    json["not_finite"] = name + ": " + result.not_finite;
  } else if (!result.reference_not_finite.empty()) {
    json["not_finite"] = "the reference: " + result.reference_not_finite;
  }
  return json;
}

void check_finite(const nlohmann::json& evaluation) {
  const nlohmann::json found = evaluation.value("not_finite", nlohmann::json());
  TORCH_CHECK(found.is_null(), found.get<std::string>());
}

}  // namespace baseq::cli
