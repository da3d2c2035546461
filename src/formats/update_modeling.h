#pragma once

#include <filesystem>

namespace baseq {

/// What update_modeling_file() did and found.
struct ModelingUpdate {
  bool written = false;  ///< false: the file was up to date
  /// Whether `auto_map` of config.json names the file's class. If not, transformers does not use the file.
  bool named = false;
};

/// Replaces the modeling_baseq.py of a native checkpoint with the one that this library writes, kModelingFile. Changes
/// no other file. For checkpoints written by an earlier version: transformers runs the file that is in the directory.
/// Throws c10::Error when `checkpoint` is not the directory of a native checkpoint, its architecture is not the one
/// that the file runs, or a file of that name is there that baseq did not write.
///
///     if (baseq::update_modeling_file("OUT").written) fmt::print("OUT now runs in newer versions of transformers\n");
ModelingUpdate update_modeling_file(const std::filesystem::path& checkpoint);

}  // namespace baseq
