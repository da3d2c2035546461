#pragma once

/// Names of the files of a Hugging Face checkpoint.
namespace baseq {

inline constexpr const char* kConfigName = "config.json";
inline constexpr const char* kWeightsName = "model.safetensors";
inline constexpr const char* kIndexName = "model.safetensors.index.json";

}  // namespace baseq
