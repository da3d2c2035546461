#pragma once

#include <filesystem>
#include <string>

namespace baseq {

/// The local cache of the Hugging Face Hub, as huggingface_hub finds it: HF_HUB_CACHE, else HUGGINGFACE_HUB_CACHE, else
/// HF_HOME/hub, else XDG_CACHE_HOME/huggingface/hub, else ~/.cache/huggingface/hub.
std::filesystem::path hub_cache();

/// The directory of a checkpoint: `model` itself when it is a directory, else the snapshot of the Hub's "org/name" in
/// hub_cache(): that of the branch "main", or of the branch, tag or whole commit that "org/name@revision" names.
/// Nothing is downloaded. Throws c10::Error saying where it looked and what to do.
std::filesystem::path resolve_checkpoint(const std::string& model);

/// What to call the model at `path`: "org/name" for a snapshot in a cache of the Hub, else the last name of the path,
/// with or without a slash at its end.
std::string model_name(const std::filesystem::path& path);

}  // namespace baseq
