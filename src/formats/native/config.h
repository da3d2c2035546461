#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "baseq/model/stored_model.h"
#include "io/json_object.h"

/// `quantization_config` of native checkpoints, see docs/format.md. Not installed.
namespace baseq {

nlohmann::json to_json(const QuantSpec& spec);
/// Throws naming the key and the value it does not know. `fallback` fills in what is missing.
QuantSpec quant_spec_from_json(JsonObject object, const QuantSpec& fallback);

/// In the oldest version from kFirstWithTransforms on that can say it. They have no place for `hadamards`.
nlohmann::json to_json(const QuantizationConfig& config);
/// Reads what to_json wrote, in this version or an older one. Throws on another method, a newer format version and what
/// this version reserves.
QuantizationConfig quantization_config_from_json(const nlohmann::json& json, const std::string& path);

}  // namespace baseq
