#include "baseq/model/stored_model.h"

#include <utility>

#include "baseq/model/model.h"
#include "quantized_linear.h"

namespace baseq {
namespace {

std::string config_path(const Checkpoint& checkpoint) { return (checkpoint.path() / "config.json").string(); }

/// fn(full name) for every linear of the blocks.
void for_each_linear_name(const ModelConfig& config, const std::function<void(const std::string& name)>& fn) {
  for (int64_t i = 0; i < config.num_hidden_layers; ++i) {
    for (const LinearShape& linear : linear_shapes(config)) fn(layer_prefix(i) + linear.name);
  }
}

}  // namespace

StoredModel::StoredModel(Checkpoint checkpoint, std::string format_name,
                         const std::function<LinearFormat(const std::string& linear)>& format_of)
    : tensors(std::move(checkpoint)),
      format(std::move(format_name)),
      config(ModelConfig::from_json(tensors.config(), config_path(tensors))),
      quantization(QuantizationConfig{.format_version = 0}) {
  const auto completed = [&](const std::string& name) {
    LinearFormat linear = format_of(name);
    complete_format(linear, tensors, name);
    return linear;
  };
  std::optional<LinearFormat> first;
  for_each_linear_name(config, [&](const std::string& name) {
    const LinearFormat& linear = linears[name] = completed(name);
    if (!first && (linear.weights || linear.input_activations)) first = linear;
  });
  if (first) {
    quantization->weights = first->weights;
    quantization->input_activations = first->input_activations;
    for (const auto& [name, linear] : linears) quantization->uniform &= linear == *first && !linear.group_index;
  }
  const LinearFormat head = completed("lm_head");
  // A head that is the embedding is not a module with weights of its own.
  if (!head.weights || !tensors.contains("lm_head.weight_scale")) return;
  TORCH_CHECK(!head.input_activations, config_path(tensors),
              ": quantization_config: quantized inputs of lm_head are not supported");
  linears["lm_head"] = head;
}

}  // namespace baseq
