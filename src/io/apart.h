#pragma once

#include <filesystem>

namespace baseq {

/// Whether `inner` is `outer` or lies below it, through whatever links either is reached. Neither needs to exist.
bool lies_in(const std::filesystem::path& inner, const std::filesystem::path& outer);

/// Throws c10::Error unless `output` can be written, replaced and removed without touching `model`, a checkpoint's
/// directory or a file: when the output is the model, holds it or a file that it links to, or lies in it.
void check_apart(const std::filesystem::path& output, const std::filesystem::path& model);

}  // namespace baseq
