#include "formats/compressed_tensors/read.h"

#include "baseq/model/model.h"
#include "formats/compressed_tensors/config.h"

namespace baseq {

bool is_compressed_tensors(const Checkpoint& checkpoint) {
  const auto it = checkpoint.config().find("quantization_config");
  return it != checkpoint.config().end() && it->is_object() &&
         it->value("quant_method", nlohmann::json()) == CompressedTensorsConfig::kMethod;
}

StoredModel read_compressed_tensors(Checkpoint checkpoint) {
  const std::string path = (checkpoint.path() / "config.json").string();
  const ModelConfig model = ModelConfig::from_json(checkpoint.config(), path);
  const size_t num_modules = linear_shapes(model).size() * static_cast<size_t>(model.num_hidden_layers) + 1;
  const CompressedTensorsConfig config(checkpoint.config().at("quantization_config"), path + ": quantization_config",
                                       num_modules);
  return {std::move(checkpoint), CompressedTensorsConfig::kMethod,
          [&](const std::string& linear) { return config.format_of(linear); }};
}

}  // namespace baseq
