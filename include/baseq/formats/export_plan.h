#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "baseq/io/checkpoint.h"

namespace baseq {

/// One tensor of an export and how to make it.
struct PlannedTensor {
  std::string name;
  at::ScalarType dtype;
  std::vector<int64_t> shape;
  std::function<Tensor()> make;
  std::string block_type{};              ///< GGUF only: its name of the type; `make` then gives the bytes
  std::vector<int64_t> logical_shape{};  ///< GGUF only: of the values that the bytes stand for
  std::string file{};                    ///< one of a subdirectory; empty: the checkpoint's own

  int64_t num_bytes() const;
};

/// Everything an export will write, before any of it is computed.
struct ExportPlan {
  std::vector<PlannedTensor> tensors;        ///< in the order in which making them is cheap
  nlohmann::json config;                     ///< the new config.json
  std::vector<std::string> notes;            ///< what the user should know about it
  std::vector<std::string> warnings;         ///< what of the source it leaves out
  std::map<std::string, std::string> files;  ///< further files of the checkpoint, by name
  std::string readme;                        ///< text that follows the source's own in README.md; empty: none
  /// Throws naming the tensor in which a written checkpoint does not hold what the source holds, the weights
  /// dequantized from the written format. Calls `step` before each.
  std::function<void(const Checkpoint& written, const std::function<void()>& step)> check_weights;
  int64_t num_extra_bytes = 0;  ///< GGUF only: of the file's header, in which the tokenizer is
  /// GGUF only: writes, checks and names the file.
  std::function<void(const ExportPlan& plan, const std::filesystem::path& output, bool force,
                     const std::function<void(int64_t done, int64_t total)>& progress)>
      write_file;

  int64_t num_bytes() const;
};

}  // namespace baseq
