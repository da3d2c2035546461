#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "baseq/io/checkpoint.h"

#pragma GCC visibility push(default)
namespace baseq {

/// One tensor of an export and how to make it.
struct PlannedTensor {
  std::string name{};
  at::ScalarType dtype = at::kFloat;
  std::vector<int64_t> shape{};
  std::function<Tensor()> make{};
  std::string file{};  ///< one of a subdirectory; empty: the checkpoint's own

  int64_t num_bytes() const;
};

/// A tensor as its format names it: "BF16", or a type of blocks such as "Q4_0", and the shape of the values.
struct ExportedTensor {
  std::string name{}, type{};
  std::vector<int64_t> shape{};
};

/// How a format that is one file is written; known to its writer alone.
struct ExportFile;

/// Everything an export will write, before any of it is computed; plan_export() makes one.
struct ExportPlan {
  std::vector<PlannedTensor> tensors{};        ///< in the order in which making them is cheap
  nlohmann::json config{};                     ///< the new config.json
  std::vector<std::string> notes{};            ///< what the user should know about it
  std::vector<std::string> warnings{};         ///< what of the source it leaves out
  std::map<std::string, std::string> files{};  ///< further files of the checkpoint, by name
  std::string readme{};                        ///< what the format says in README.md, a section; empty: nothing
  /// Throws naming the tensor in which a written checkpoint does not hold what the source holds, the weights
  /// dequantized from the written format. Calls `step` before each.
  std::function<void(const Checkpoint& written, const std::function<void()>& step)> check_weights{};
  std::shared_ptr<const ExportFile> single_file{};  ///< of a format that is one file; null: a directory is written

  int64_t num_bytes() const;
  /// The tensors as users of the format know them.
  std::vector<ExportedTensor> exported_tensors() const;
};

}  // namespace baseq
#pragma GCC visibility pop
