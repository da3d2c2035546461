#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "baseq/model/quantization_config.h"
#include "baseq/quant/gptq.h"

namespace baseq {

/// A method as data: one strict JSON file. What is absent is left in full precision, unlearned or unrotated.
struct Recipe {
  enum class Rounding { kNearest, kGptq };
  enum class ShiftStart { kZero, kMean };
  enum class Stream { kFullPrecision, kQuantized };
  enum class Loss { kMse, kRelative };

  /// A dynamic activation grid and the share of the range that it covers before anything is learned.
  struct Activations {
    QuantSpec spec;
    double clip = 1.0;
  };

  std::string name;
  std::optional<QuantSpec> weights;
  Rounding rounding = Rounding::kNearest;
  GptqOptions gptq;
  /// GPTAQ: rounding makes up for the difference of the two streams as well (arXiv 2504.02692).
  bool compensate_streams = false;
  /// Activations and cache are quantized while the inputs of the rounded linears are collected.
  bool quantized_inputs = false;
  /// Shrinks the Hessian towards its diagonal by this share: fewer tokens than features overfit.
  double hessian_shrinkage = 0.0;
  std::optional<Activations> input_activations;
  std::optional<Activations> kv_cache;

  struct Transforms {
    bool residual = false;   ///< Hadamard of the residual stream, merged
    bool value = false;      ///< Hadamard of every value head, merged
    bool query_key = false;  ///< Hadamard of q and k after RoPE, online
    bool down = false;       ///< Hadamard of down_proj's input, online
  } transforms;

  /// Dtype of the matrices that stay unquantized; absent: that of the checkpoint.
  std::optional<at::ScalarType> dtype;
  int64_t num_samples = 128;  ///< calibration windows
  int64_t seq_len = 2048;     ///< tokens a window

  /// Throws c10::Error naming the path of an unknown key or an impossible value.
  static Recipe from_json(const nlohmann::json& json, const std::string& path);
  nlohmann::json to_json() const;

  bool needs_calibration() const;
  QuantizationConfig quantization_config() const;
};

/// Sets the value at a dotted path such as "weights.num_bits" in a recipe's JSON; `text` is JSON, or else a string.
/// Throws when a key on the way holds something other than an object.
void override_recipe(nlohmann::json& recipe, const std::string& path, const std::string& text);

}  // namespace baseq
