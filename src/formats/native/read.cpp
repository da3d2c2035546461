#include "baseq/model/model.h"
#include "baseq/transform/hadamard.h"
#include "formats/native/config.h"
#include "formats/native/tensors.h"
#include "io/strict_json.h"

namespace baseq {
namespace {

/// Every online transform of the model, and how to read it.
std::map<std::pair<int64_t, Site>, StoredTransform> online_transforms(const StoredModel& model) {
  std::map<std::pair<int64_t, Site>, StoredTransform> online;
  const auto checkpoint = std::make_shared<const Checkpoint>(model.tensors);
  const bool in_config = !model.quantization->hadamards.empty();  // of old versions, which store no such tensors
  for (const auto& [place, kinds] : find_transforms(*checkpoint, model.config, *model.quantization)) {
    const Site site = place.second;
    const std::string prefix = layer_prefix(place.first);
    const int64_t width = site_shape(site, model.config).width();
    StoredTransform& stored = online[place] = {kinds, transform_names(prefix, site, kinds), {}};
    stored.read = [=, kinds = kinds]() -> Transform {
      if (!in_config) return read_transform(*checkpoint, prefix, site, kinds, width);
      const int64_t order = hadamard_block_size(width);
      return {hadamard_factor(order, width / order)};
    };
  }
  return online;
}

}  // namespace

StoredModel::StoredModel(Checkpoint checkpoint)
    : tensors(std::move(checkpoint)),
      config(ModelConfig::from_json(tensors.config(), (tensors.path() / "config.json").string())) {
  const auto it = tensors.config().find("quantization_config");
  if (it == tensors.config().end() || it->is_null()) return;
  quantization =
      quantization_config_from_json(*it, (tensors.path() / "config.json").string() + ": quantization_config");
  format = QuantizationConfig::kMethod;
  const LinearFormat all{.weights = quantization->weights, .input_activations = quantization->input_activations};
  for (int64_t i = 0; i < config.num_hidden_layers; ++i) {
    for (const LinearShape& linear : linear_shapes(config)) linears[layer_prefix(i) + linear.name] = all;
  }
  for (const auto& [name, grid] : quantization->overrides) {
    const auto linear = linears.find(name);
    TORCH_CHECK(linear != linears.end(), (tensors.path() / "config.json").string(),
                ": quantization_config: overrides: the model has no linear ", quote(name));
    linear->second.weights = grid;
  }
  TORCH_CHECK(!config.tie_word_embeddings || quantization->head == quantization->embedding,
              (tensors.path() / "config.json").string(),
              ": quantization_config: head and embedding have different grids, but tie_word_embeddings says that they "
              "are one matrix");
  if (quantization->embedding) linears["model.embed_tokens"].weights = quantization->embedding;
  if (quantization->head && !config.tie_word_embeddings) linears["lm_head"].weights = quantization->head;
  online = online_transforms(*this);
}

}  // namespace baseq
