#include <fmt/format.h>

#include <algorithm>
#include <memory>

#include "baseq/formats/open_model.h"
#include "eval/checkpoint_summary.h"
#include "evaluation.h"
#include "help.h"
#include "io/dtype_name.h"
#include "next_step.h"
#include "output_files.h"

namespace baseq::cli {
namespace {

struct InspectArguments {
  CommonOptions common;
  std::string model;
  bool tensors = false;
};

/// What config.json asks of attention beside the sizes.
std::string describe_attention(const ModelConfig& config) {
  const char* types[] = {"default", "linear", "dynamic", "llama3", "yarn", "longrope"};
  std::string text = fmt::format("rope {}", types[static_cast<size_t>(config.rope.type)]);
  if (config.rope.type != RopeParameters::Type::kDefault) text += fmt::format(" by {}", config.rope.factor);
  text += fmt::format(", theta {}", config.rope.theta);
  int64_t without_rope = 0, windows = 0, window = 0;
  for (const auto& block : config.blocks) {
    without_rope += !block.rope;
    windows += block.sliding_window > 0;
    window = std::max(window, block.sliding_window);
  }
  if (without_rope > 0) text += fmt::format(", {} layers without", without_rope);
  if (windows > 0) text += fmt::format(", window of {} in {} layers", window, windows);
  if (config.qk_norm) text += ", norms of q and k";
  return text;
}

/// "gguf: Q4_0 61.2 %, F16 38.5 %, F32 0.3 %", "awq".
std::string describe_format(const StoredModel& model) {
  std::vector<std::pair<int64_t, std::string>> types;
  int64_t total = 0;
  for (const auto& [type, bytes] : model.bytes_by_type) {
    types.emplace_back(bytes, type);
    total += bytes;
  }
  std::sort(types.rbegin(), types.rend());
  std::string text = model.format;
  for (const auto& [bytes, type] : types) {
    text += fmt::format("{} {} {:.1f} %", text == model.format ? ":" : ",", type,
                        100 * static_cast<double>(bytes) / static_cast<double>(total));
  }
  return text;
}

/// A line for each grid of a checkpoint whose linears are not alike.
std::string describe_mixture(const StoredModel& model) {
  // Some of its types are read dequantized: the line about the format says which there are.
  if (model.format == "gguf") return "    not all linears alike: that is the grid of the first\n";
  std::string text;
  for (const auto& [grid, linears] : describe_linears(model)) text += fmt::format("    {}: {}\n", grid, linears);
  return text;
}

void run(const InspectArguments& arguments) {
  check_outputs(arguments.common);
  const Model model(open_model(arguments.model));
  const Checkpoint& checkpoint = model.checkpoint();
  warn_of_unused(model);
  const ModelConfig& config = model.config();
  nlohmann::json tensors = nlohmann::json::array();
  int64_t num_values = 0;
  for (const std::string& name : checkpoint.names()) {
    const TensorInfo info = checkpoint.info(name);
    num_values += info.numel();
    tensors.push_back({{"name", name}, {"dtype", dtype_name(info.dtype)}, {"shape", info.shape}});
  }
  nlohmann::json bits_by_linear = nlohmann::json::object();
  for (const auto& [linear, stored] : stored_bits(model.stored())) bits_by_linear[linear] = stored.per_weight();
  print_text("{}\n  format        {}\n  architecture  {}\n", arguments.model, describe_format(model.stored()),
             config.architecture);
  print_text("  layers        {}, hidden {}, heads {} of {}, key/value heads {}, ffn {}, vocabulary {}\n",
             config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.head_dim,
             config.num_key_value_heads, config.intermediate_size, config.vocab_size);
  print_text("  attention     {}\n", describe_attention(config));
  print_text("  head          {}\n  size          {} in {} tensors\n", config.tie_word_embeddings ? "tied" : "untied",
             format_bytes(checkpoint.num_bytes()), tensors.size());
  if (const auto& quantization = model.quantization()) {
    const CheckpointSummary summary = summarize(model);
    print_text("  weights       {}{}\n{}  activations   {}\n  KV cache      {}\n  online        {}\n", summary.weights,
               quantization->weights ? fmt::format(": {:.3f} bits a weight in all", summary.bits_per_weight) : "",
               summary.uniform ? "" : describe_mixture(model.stored()), summary.input_activations, summary.kv_cache,
               describe_online(model));
    if (!summary.recipe.empty()) print_text("  recipe        {}\n", summary.recipe);
  }
  if (arguments.tensors) {
    for (const auto& tensor : tensors) {
      print_text("  {:<60} {:<9} {}\n", tensor["name"].get<std::string>(), tensor["dtype"].get<std::string>(),
                 tensor["shape"].dump());
    }
  }
  write_json(arguments.common, {{"model", arguments.model},
                                {"config", checkpoint.config()},
                                {"bytes", checkpoint.num_bytes()},
                                {"num_values", num_values},
                                {"format", model.stored().format},
                                {"bytes_by_type", model.stored().bytes_by_type},
                                {"bits_per_weight", bits_per_weight(model.stored())},
                                {"bits_by_linear", bits_by_linear},
                                {"tensors", tensors},
                                {"unused_tensors", model.unused_names()}});
  const std::string name = shell_word(arguments.model);
  if (model.quantization()) {
    say_next(false, "baseq generate {} \"Once upon a time\"", name);
  } else {
    say_next(false, "baseq quantize {}", name);
  }
}

}  // namespace

void add_inspect(CLI::App& app) {
  auto arguments = std::make_shared<InspectArguments>();
  CLI::App* command = app.add_subcommand("inspect", "What a checkpoint holds");
  command
      ->add_option("model", arguments->model,
                   "Checkpoint directory, GGUF file, or org/name in the local Hugging Face cache")
      ->required()
      ->transform(checkpoint_path());
  begin_group(*command, "Contents");
  command->add_flag("--tensors", arguments->tensors, "List every tensor");
  add_common_options(*command, arguments->common, {});
  command->footer("Example:\n  baseq inspect out --tensors");
  command->callback([arguments] { run(*arguments); });
}

}  // namespace baseq::cli
