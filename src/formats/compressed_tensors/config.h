#pragma once

#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "baseq/model/stored_model.h"

struct pcre2_real_code_8;
struct pcre2_real_match_context_8;

/// The `quantization_config` that compressed-tensors writes. Not installed.
namespace baseq {

/// What the lists of targets of a file name: classes, modules, or "re:" and a regular expression that has to match from
/// the start of a module's name.
class ModuleTargets {
 public:
  /// Adds a target with the `value` that find() gives for it; messages begin with `path`.
  void add(const std::string& target, size_t value, const std::string& path);
  /// Matching `num_modules` names takes about a second at most, whatever the expressions: find() throws c10::Error
  /// where its share of that does not suffice, and this does where the shares would be too small for any expression.
  void limit_steps(size_t num_modules, const std::string& path);
  /// The value of the target that means a module of class Linear most exactly: its name, then an expression, then its
  /// class, each the one added first; nothing when there is none.
  std::optional<size_t> find(const std::string& module) const;

 private:
  struct Expression {
    std::string text;
    std::shared_ptr<const pcre2_real_code_8> code;
    size_t value;
  };
  std::unordered_map<std::string, size_t> names_;
  std::vector<Expression> expressions_;
  std::optional<size_t> class_;
  std::shared_ptr<pcre2_real_match_context_8> context_;
};

class CompressedTensorsConfig {
 public:
  static constexpr const char* kMethod = "compressed-tensors";
  /// Throws naming what this program does not execute: formats other than pack-quantized, int-quantized and
  /// naive-quantized integers, online transforms, sparsity, a quantized cache, ...
  /// @param num_modules  that format_of will be asked for
  CompressedTensorsConfig(const nlohmann::json& value, const std::string& path, size_t num_modules);
  /// Of a linear by its full name; scale_dtype is left at its default.
  LinearFormat format_of(const std::string& module) const;

 private:
  ModuleTargets ignored_, targets_;
  std::vector<LinearFormat> formats_;  // of the groups
};

}  // namespace baseq
