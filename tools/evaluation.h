#pragma once

#include <optional>
#include <string>

#include "baseq/eval/evaluate.h"
#include "baseq/formats/open_model.h"
#include "commands.h"

namespace baseq::cli {

/// Which tokens a model is evaluated on.
struct WindowOptions {
  std::string text, tokens, tokenizer;
  int64_t seq_len = 2048, max_windows = 0;
};

/// --text, --tokens, --tokenizer, --seq-len and --max-windows.
void add_window_options(CLI::App& command, WindowOptions& options);

/// --arithmetic and --activation-bits.
void add_arithmetic_options(CLI::App& command, LoadOptions& options);

/// The windows [n, seq_len]; text is tokenized as `checkpoint` does, or by the tokenizer named.
Tensor read_windows(const WindowOptions& options, const Checkpoint& checkpoint);

/// Warns of everything in the model's checkpoint that it does not use.
void warn_of_unused(const Model& model);

/// Opens a model; warns of what it does not use.
Model opened(const std::string& path, at::Device device);

struct EvaluationContext {
  LoadOptions load;
  Reference* reference = nullptr;               ///< may be null
  std::filesystem::path activations_directory;  ///< see EvaluateOptions
  std::function<void(const Tensor&)> logits;    ///< see EvaluateOptions; may be empty
  bool quiet = false;
  Communicator communicator{};  ///< see EvaluateOptions
};

/// evaluate() with a progress bar; what `eval --json` writes but for seconds and memory. "not_finite" says where values
/// stop being finite, or is null.
nlohmann::json evaluate_model(const std::string& name, const Model& model, const Tensor& windows,
                              const EvaluationContext& context);

/// Throws what "not_finite" of an evaluation says. Called after the results are written: a script must not take NaN for
/// a success.
void check_finite(const nlohmann::json& evaluation);

}  // namespace baseq::cli
