#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "baseq/model/quantization_config.h"
#include "baseq/quant/fbquant.h"
#include "baseq/quant/gptq.h"

namespace baseq {

/// A method as data: one strict JSON file. What is absent is left in full precision, unlearned or unrotated.
struct Recipe {
  enum class Rounding { kNearest, kGptq };
  /// Where a learned or measured shift begins; kNone: the point has no shift.
  enum class Shift { kNone, kZero, kMean };
  enum class Stream { kFullPrecision, kQuantized };
  /// kMse: the mean of squared errors. kRelative: each token's squared error over its energy, so that the few tokens
  /// with massive activations do not decide alone.
  enum class Loss { kMse, kRelative };

  /// A dynamic activation grid and how its corrections start.
  struct Activations {
    QuantSpec spec;
    double clip = 1.0;  ///< share of the range that the grid covers
    Shift shift = Shift::kNone;
  };
  struct InputActivations : Activations {
    Shift norm_shift = Shift::kNone;  ///< at the two points behind a norm; `shift` is for o and down
  };

  struct Transforms {
    // Hadamard transforms.
    bool residual = false;   ///< of the residual stream, merged
    bool input = false;      ///< of the norms' outputs, online
    bool value = false;      ///< of every value head, merged
    bool query_key = false;  ///< of q and k after RoPE, online
    bool o = false;          ///< of o_proj's input, online
    bool down = false;       ///< of down_proj's input, online
    // Paired scales in closed form, merged, see balance.h.
    bool scale_norm = false;
    bool scale_value = false;
    bool scale_query_key = false;
    bool scale_down = false;
  };

  /// A correction of low rank beside every rounded weight.
  struct LowRank {
    /// What the rest of the weight's error is measured with: as it is (arXiv 2303.08302), the inputs' mean magnitudes
    /// (arXiv 2402.02446), their variances or their second moments (arXiv 2410.06040).
    /// kFbquant learns the correction together with the rounding, see quant/fbquant.h.
    enum class Method { kSvd, kL2qer, kQeraApprox, kQeraExact, kFbquant };
    Method method = Method::kQeraExact;
    int64_t rank = 16;
    at::ScalarType dtype = at::kBFloat16;  ///< of the factors; at::kChar: codes of 8 bits
    FbquantOptions fbquant;                ///< but for rank and dtype
    int64_t block_epochs = 0;              ///< of learn_low_rank; 0: FBQuant's layer objective alone
    double block_learning_rate = 0.01;     ///< in units of the root mean square of A
  };

  /// BASE-Q's stage 1: transforms of value and down_proj input, with straight-through weights.
  struct TransformLearning {
    int64_t epochs = 0;
    bool value_rotation = true;  ///< an orthogonal matrix a key/value head, before the Hadamard
    bool value_scale = true;     ///< paired, between v and o
    bool o_scale = true;         ///< paired, on o's input
    bool down_scale = true;      ///< paired, between up and down
    double lr_rotation = 3e-3;
    double lr_scale = 3e-3;
    double lr_clip = 3e-2;
    double lr_shift = 2e-3;
    double final_lr = 3e-5;
  };
  /// BASE-Q's stage 3: corrections of the quant points, with frozen weights.
  struct ActivationLearning {
    int64_t epochs = 0;
    bool clip = true;
    bool shift = true;  ///< of the points that have one
    bool gain = true;
    double lr_clip = 3e-2;
    double lr_shift = 2e-3;
    double lr_gain = 3e-3;
    double final_lr = 3e-6;
  };

  std::string name;
  std::optional<QuantSpec> weights;
  Rounding rounding = Rounding::kNearest;
  GptqOptions gptq;
  /// GPTAQ: rounding makes up for the difference of the two streams as well (arXiv 2504.02692).
  bool compensate_streams = false;
  /// Activations and cache are quantized while the inputs of the rounded linears are collected.
  bool quantized_inputs = false;
  std::optional<LowRank> low_rank;
  std::optional<InputActivations> input_activations;
  std::optional<Activations> kv_cache;
  Transforms transforms;
  TransformLearning learn_transforms;
  ActivationLearning learn_activations;
  Loss loss = Loss::kMse;                   ///< weighs the tokens in learning, rounding, scales and means alike
  Stream stream = Stream::kFullPrecision;   ///< what the learned block is given
  at::ScalarType products = at::kBFloat16;  ///< dtype of the matrix products while learning; sums stay in float32
  int64_t batch_size = 1;                   ///< windows a step
  int64_t num_monitored = 4;                ///< windows on which the best state is chosen

  /// Dtype of the matrices that stay unquantized; absent: that of the checkpoint.
  std::optional<at::ScalarType> dtype;
  int64_t num_samples = 128;                      ///< calibration windows
  int64_t seq_len = 2048;                         ///< tokens a window
  at::ScalarType activations_dtype = at::kFloat;  ///< in which the activation streams are kept between blocks

  /// Throws c10::Error naming the path of an unknown key or an impossible value.
  static Recipe from_json(const nlohmann::json& json, const std::string& path);
  nlohmann::json to_json() const;

  bool needs_calibration() const;
  bool learns() const;  ///< whether a stage takes gradient steps on a block's output
  /// GPTQ and every low-rank correction but the plain SVD ask for moments of the inputs.
  bool rounding_needs_moments() const;
  bool has_mean_shift() const;
  QuantizationConfig quantization_config() const;
};

/// Sets the value at a dotted path such as "weights.num_bits" in a recipe's JSON; `text` is JSON, or else a string.
/// Throws when a key on the way holds something other than an object.
void override_recipe(nlohmann::json& recipe, const std::string& path, const std::string& text);

}  // namespace baseq
