#pragma once

#include <string_view>

namespace baseq {

/// The Python file that every native checkpoint carries and its config.json names in `auto_map`: transformers runs the
/// checkpoint with it when it is told to trust code of the checkpoint's folder.
inline constexpr const char* kModelingFile = "modeling_baseq.py";
inline constexpr const char* kModelingClass = "modeling_baseq.BaseqForCausalLM";
/// The architecture that it runs: it knows nothing of what sets the others apart.
inline constexpr const char* kModelingArchitecture = "LlamaForCausalLM";

/// Its text.
std::string_view modeling_source();

}  // namespace baseq
