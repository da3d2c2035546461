#include "formats/update_modeling.h"

#include <ATen/ATen.h>

#include "baseq/io/checkpoint.h"
#include "baseq/model/config.h"
#include "formats/native/config.h"
#include "formats/native/modeling_source.h"
#include "io/files.h"

namespace baseq {
namespace {

namespace fs = std::filesystem;

constexpr const char* kWho = "update";
constexpr size_t kMaxBytes = size_t{1} << 20;  // some 25 KB are usual

void check_native(const Checkpoint& checkpoint) {
  const std::string path = checkpoint.path().string();
  const auto quantization = checkpoint.config().find("quantization_config");
  const bool quantized = quantization != checkpoint.config().end() && quantization->is_object();
  const auto method = quantized ? quantization->find("quant_method") : quantization;
  TORCH_CHECK(quantized && method != quantization->end() && *method == QuantizationConfig::kMethod, kWho, ": ", path,
              " is no checkpoint that baseq quantized: quantization_config of its config.json does not say "
              "quant_method \"",
              QuantizationConfig::kMethod, "\"");
  quantization_config_from_json(*quantization, path + "/config.json: quantization_config");
  const std::string architecture = ModelConfig::from_json(checkpoint.config(), path + "/config.json").architecture;
  TORCH_CHECK(architecture == kModelingArchitecture, kWho, ": ", path, " is a ", architecture, "; ", kModelingFile,
              " runs ", kModelingArchitecture, " only, so there is none to update");
}

bool names_class(const nlohmann::json& config) {
  const auto map = config.find("auto_map");
  if (map == config.end() || !map->is_object()) return false;
  const auto name = map->find("AutoModelForCausalLM");
  return name != map->end() && *name == kModelingClass;
}

}  // namespace

ModelingUpdate update_modeling_file(const fs::path& directory) {
  const Checkpoint checkpoint(directory);
  check_native(checkpoint);
  ModelingUpdate update{.written = true, .named = names_class(checkpoint.config())};
  const fs::path path = directory / kModelingFile;
  if (path_exists(kWho, path)) {
    const std::string text = read_file(kWho, path, kMaxBytes);
    TORCH_CHECK(text.find("class BaseqForCausalLM") != text.npos, kWho, ": ", path.string(),
                " is not what baseq writes: it has no class BaseqForCausalLM; move it elsewhere to get the file");
    update.written = text != modeling_source();
  }
  if (!update.written) return update;
  // Renamed, the new file takes the place of a link. What the link points to, a blob of the Hub's cache, stays.
  fs::path fresh = path;
  fresh += ".new";
  FileWriter file(kWho, fresh);
  file.write(modeling_source());
  file.commit();
  std::error_code error;
  fs::rename(fresh, path, error);
  TORCH_CHECK(!error, kWho, ": cannot rename ", fresh.string(), " to ", path.string(), ": ", error.message());
  sync_directory(kWho, directory);
  return update;
}

}  // namespace baseq
