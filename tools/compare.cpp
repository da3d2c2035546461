#include <fmt/format.h>

#include <algorithm>
#include <memory>

#include "commands.h"
#include "eval/checkpoint_summary.h"
#include "evaluation.h"
#include "help.h"
#include "next_step.h"
#include "output_files.h"
#include "started_processes.h"
#include "text_table.h"

namespace baseq::cli {
namespace {

struct CompareArguments {
  CommonOptions common;
  WindowOptions windows;
  LoadOptions load;
  std::vector<std::string> models;
  std::string reference;
};

void run(CompareArguments arguments) {
  const Communicator processes = started_processes(arguments.common);
  const at::Device device = apply(arguments.common);
  check_outputs(arguments.common);
  TORCH_CHECK(arguments.models.size() == 1 || arguments.windows.text != "/dev/stdin",
              "--text -: each model reads the text anew; pass a file");
  const bool evaluated = !arguments.windows.text.empty() || !arguments.windows.tokens.empty();
  if (!arguments.reference.empty() && !evaluated) throw CLI::RequiredError("--text or --tokens (with --reference)");
  std::optional<Model> original;
  std::optional<Reference> reference;
  if (!arguments.reference.empty()) reference.emplace(Reference{original.emplace(opened(arguments.reference, device))});
  nlohmann::json models = nlohmann::json::array();
  std::vector<std::vector<std::string>> rows{
      {"model", "recipe", "weights", "activations", "KV cache", "bits a weight", "size"}};
  if (evaluated) rows[0].insert(rows[0].end(), {"perplexity", "mean KL", "top-1"});
  for (const std::string& path : arguments.models) {
    const Model model = opened(path, device);
    const CheckpointSummary summary = summarize(model);
    nlohmann::json entry{{"model", path},
                         {"name", summary.name},
                         {"recipe", summary.recipe.empty() ? nlohmann::json() : nlohmann::json(summary.recipe)},
                         {"weights", summary.weights},
                         {"input_activations", summary.input_activations},
                         {"kv_cache", summary.kv_cache},
                         {"bits_per_weight", summary.bits_per_weight},
                         {"model_bytes", summary.num_bytes}};
    std::vector<std::string> row{summary.name,
                                 summary.recipe.empty() ? "-" : summary.recipe,
                                 summary.weights,
                                 summary.input_activations,
                                 summary.kv_cache,
                                 fmt::format("{:.3f}", summary.bits_per_weight),
                                 format_bytes(summary.num_bytes)};
    if (evaluated) {
      entry.update(evaluate_model(path, model, read_windows(arguments.windows, model.checkpoint()),
                                  {.load = arguments.load,
                                   .reference = reference ? &*reference : nullptr,
                                   .activations_directory = {},
                                   .logits = {},
                                   .quiet = arguments.common.quiet,
                                   .communicator = processes}));
      row.insert(row.end(), {show_number(entry["perplexity"], 4), show_number(entry["mean_kl"], 5),
                             show_number(entry["top1_agreement"], 2, 100, " %")});
    }
    models.push_back(std::move(entry));
    rows.push_back(std::move(row));
  }
  constexpr size_t kTextColumns = 5;
  print_text("{}", markdown_table(rows, kTextColumns));
  write_json(arguments.common, {{"models", models}});
  if (evaluated) std::for_each(models.begin(), models.end(), check_finite);
  say_next(arguments.common.quiet, "{}",
           evaluated ? "baseq report OUT, a page of how one of them came about"
                     : "the same with --text FILE --reference MODEL: how good they are");
}

}  // namespace

void add_compare(CLI::App& app) {
  auto arguments = std::make_shared<CompareArguments>();
  CLI::App* command = app.add_subcommand("compare", "One table of several checkpoints, quantized or not");
  command->add_option("models", arguments->models, "Checkpoint directories, or org/name in the local cache")
      ->required()
      ->transform(checkpoint_path());
  add_window_options(*command, arguments->windows);
  add_arithmetic_options(*command, arguments->load);
  begin_group(*command, "Comparison");
  command->add_option("--reference", arguments->reference, "Checkpoint for KL divergence and top-1 agreement")
      ->transform(checkpoint_path());
  add_common_options(*command, arguments->common, {.device = true, .threads = true, .quiet = true});
  command->footer("Example:\n  baseq compare MODEL out other --text wikitext2-test.txt --reference MODEL");
  command->callback([arguments] { run(*arguments); });
}

}  // namespace baseq::cli
