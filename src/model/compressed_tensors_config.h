#pragma once

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "baseq/model/quantization_config.h"

struct pcre2_real_code_8;

/// The `quantization_config` that compressed-tensors writes. Not installed.
namespace baseq {

/// What a config group or the list of ignored modules names: a class, a module, or "re:" and a regular expression that
/// has to match from the start of the module's name.
class ModuleTarget {
 public:
  /// How exactly a module is meant; the most exact target decides.
  enum class Match { kNone, kClass, kPattern, kName };
  ModuleTarget(std::string text, const std::string& path);
  Match match(const std::string& module) const;  ///< of a module of class Linear

 private:
  std::string text_;
  std::shared_ptr<const pcre2_real_code_8> pattern_;
};

class CompressedTensorsConfig {
 public:
  static constexpr const char* kMethod = "compressed-tensors";
  /// Throws naming what this program does not execute: formats other than pack-quantized, int-quantized and
  /// naive-quantized integers, online transforms, sparsity, a quantized cache, ...
  CompressedTensorsConfig(const nlohmann::json& value, const std::string& path);
  /// Of a linear by its full name; scale_dtype is left at its default.
  LinearFormat format_of(const std::string& module) const;

 private:
  struct Group {
    std::vector<ModuleTarget> targets;
    LinearFormat format;
  };
  std::vector<ModuleTarget> ignore_;
  std::vector<Group> groups_;
};

}  // namespace baseq
