#pragma once

#include <ATen/ATen.h>

#include "baseq/io/checkpoint.h"
#include "temp_directory.h"

/// A checkpoint whose one tensor "a" is filled with one value.
namespace baseq::test {

inline const nlohmann::json kConfig = {{"hidden_size", 8}};

inline void write_checkpoint(const std::filesystem::path& directory, double value, bool force = false) {
  CheckpointWriter writer(directory, {.force = force});
  writer.add("a", at::full({4}, value));
  writer.finish(kConfig);
}

inline double value_of(const std::filesystem::path& directory) {
  return Checkpoint(directory).tensor("a")[0].item<double>();
}

}  // namespace baseq::test
