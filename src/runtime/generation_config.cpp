#include <c10/util/Exception.h>

#include "baseq/runtime/generate.h"
#include "io/json_object.h"

namespace baseq {
namespace {

std::vector<int32_t> eos_of(const nlohmann::json& config, const std::string& path) {
  std::vector<int32_t> ids;
  const auto it = config.find("eos_token_id");
  if (it == config.end() || it->is_null()) return ids;
  for (const nlohmann::json& id : it->is_array() ? *it : nlohmann::json::array({*it})) {
    TORCH_CHECK(id.is_number_integer() && id.get<int64_t>() >= 0 && id.get<int64_t>() <= INT32_MAX, path,
                ": eos_token_id: expected token ids, got ", id.dump());
    ids.push_back(id.get<int32_t>());
  }
  return ids;
}

}  // namespace

GenerationConfig read_generation_config(const Checkpoint& checkpoint) {
  GenerationConfig result;
  // Beside a GGUF file lies what belongs to other models.
  std::error_code error;
  const bool is_directory = std::filesystem::is_directory(checkpoint.path(), error);
  const std::filesystem::path path = checkpoint.directory() / "generation_config.json";
  if (is_directory && std::filesystem::exists(path)) {
    const nlohmann::json json = read_json_file(path.string());
    JsonObject object(json, path.string());
    SamplingOptions& sampling = result.sampling;
    if (object.boolean("do_sample", false)) sampling.temperature = object.number("temperature", 1, 0, 1e6);
    sampling.top_k = object.integer("top_k", 0, 0, 1'000'000'000);
    sampling.top_p = object.number("top_p", 1, 0, 1);
    sampling.min_p = object.number("min_p", 0, 0, 1);
    sampling.repetition_penalty = object.number("repetition_penalty", 1, 1e-3, 1e3);
    result.eos = eos_of(json, path.string());
  }
  if (result.eos.empty()) result.eos = eos_of(checkpoint.config(), checkpoint.path().string());
  return result;
}

}  // namespace baseq
