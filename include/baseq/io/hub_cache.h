#pragma once

#include <filesystem>
#include <string>

namespace baseq {

/// The local cache of the Hugging Face Hub, as huggingface_hub finds it: HF_HUB_CACHE, else HUGGINGFACE_HUB_CACHE, else
/// HF_HOME/hub, else XDG_CACHE_HOME/huggingface/hub, else ~/.cache/huggingface/hub.
std::filesystem::path hub_cache();

/// The directory of a checkpoint: `model` itself when it is a directory, else the snapshot that `refs/main` of the
/// Hub's "org/name" names in hub_cache(). Nothing is downloaded. Throws c10::Error saying where it looked and what to
/// do.
std::filesystem::path resolve_checkpoint(const std::string& model);

}  // namespace baseq
