#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "baseq/model/quantization_config.h"
#include "baseq/pipeline/step.h"

namespace baseq {

/// The integer grids of a quantized model; what has none stays in full precision.
struct Grids {
  /// A grid of input_activations: one scale per token.
  static constexpr QuantSpec kPerToken{.symmetric = false, .strategy = Strategy::kToken, .dynamic = true};
  /// A grid of kv_cache: one scale per token and head. The group is a head; its size depends on the model.
  static constexpr QuantSpec kPerTokenAndHead{.symmetric = false, .strategy = Strategy::kGroup, .dynamic = true};

  std::optional<QuantSpec> weights;            ///< of the linears of a block; needs a round step
  std::optional<QuantSpec> input_activations;  ///< of what these linears read; needs points steps
  std::optional<QuantSpec> kv_cache;           ///< of the keys after RoPE and the values; needs points steps
};

/// A method as data: grids say what is quantized, steps say how. Read one from a strict JSON file, or build it:
///
///     Recipe recipe;
///     recipe.grids.weights = QuantSpec{.num_bits = 4};
///     recipe.passes = {Pass{{RoundStep{.method = RoundStep::Method::kGptq}}}};
///     recipe.validate();
struct Recipe {
  enum class TokenWeights {
    kUniform,
    /// The squared error of a token counts relative to the energy of its target, so that the few tokens with massive
    /// activations do not decide alone.
    kInverseEnergy,
  };

  std::string name;
  /// Dtype of the matrices that stay unquantized; absent: that of the checkpoint.
  std::optional<at::ScalarType> dtype;
  Grids grids;
  TokenWeights token_weights = TokenWeights::kUniform;  ///< in learning, rounding, closed-form scales and means
  int64_t num_samples = 128;                            ///< calibration windows
  int64_t seq_len = 2048;                               ///< tokens per window
  at::ScalarType activations_dtype = at::kFloat;        ///< in which the activation streams are kept between blocks
  std::vector<Pass> passes = std::vector<Pass>(1);

  /// @param path how errors name the recipe, usually its file
  /// Throws c10::Error naming step and key of an unknown key, a value out of its range, or an impossible order of
  /// steps.
  static Recipe from_json(const nlohmann::json& json, const std::string& path);
  /// Every default written out.
  nlohmann::json to_json() const;
  /// Throws c10::Error for what from_json() would refuse. Recipes that were read are valid.
  void validate() const;

  /// The steps of one type in all passes, in order: steps_of<LearnStep>().
  template <class Type>
  std::vector<const Type*> steps_of() const {
    std::vector<const Type*> found;
    for (const Pass& pass : passes) {
      for (const Step& step : pass.steps) {
        if (const auto* typed = std::get_if<Type>(&step)) found.push_back(typed);
      }
    }
    return found;
  }
  /// How errors name a step: "steps[3]", or "passes[1].steps[3]" when there are several passes.
  std::string step_path(size_t pass, size_t step) const;

  const RoundStep* round_step() const;  ///< the last one; nullptr: none
  bool has_transform(Site site) const;
  bool rotates_residual() const { return has_transform(Site::kResidual); }
  bool has_mean_shift() const;
  bool learns() const;                  ///< whether a step takes gradient steps
  bool rounding_needs_moments() const;  ///< whether a round step does, see needs_moments
  bool needs_calibration() const;
  QuantizationConfig quantization_config() const;
};

/// The name in recipes of the quant point at a site: that of the site, or k_cache or v_cache.
std::string point_name(Site site);

/// GPTQ and every low-rank correction except the plain SVD need second moments of the inputs.
bool needs_moments(const RoundStep& step);

/// Sets the value at a dotted path such as "grids.weights.num_bits" or "steps.3.epochs" in a recipe's JSON. `text` is
/// JSON, or else a string. A number in the path is the index of an item of a list; everything after "rates" is one key,
/// because the names of rates contain dots. Throws c10::Error naming the part of the path that leads nowhere.
void override_recipe(nlohmann::json& recipe, const std::string& path, const std::string& text);

}  // namespace baseq
