#pragma once

#include <optional>
#include <vector>

#include "baseq/model/site.h"
#include "baseq/quant/quantize.h"

namespace baseq {

/// How a checkpoint stores one linear and what quantizes its input; absent parts are in full precision.
struct LinearFormat {
  std::optional<QuantSpec> weights{};
  std::optional<QuantSpec> input_activations{};
  enum class Codes {
    kPacked,  ///< `weight_packed`, a dense stream of bits
    kPadded,  ///< `weight_packed` of compressed-tensors before 0.18: no code straddles two words
    kInt8,    ///< `weight`, one byte a code
  } codes = Codes::kPacked;
  /// `weight_g_idx` gives the group of each column, and groups are not runs of neighbours: such weights are read
  /// dequantized, without codes.
  bool group_index = false;

  bool operator==(const LinearFormat&) const = default;
};

/// What a quantized checkpoint's config.json says about how to run it; absent parts are in full precision.
struct QuantizationConfig {
  static constexpr const char* kMethod = "baseq";
  static constexpr int64_t kFormatVersion = 6;        ///< the newest that is read
  static constexpr int64_t kOldestFormatVersion = 3;  ///< 4 added factors of 8 bits, 5 tensors of online transforms
  static constexpr int64_t kFirstWithTransforms = 5;
  static constexpr int64_t kFirstWithHead = 6;  ///< and embedding; written only where one of them is quantized

  std::optional<QuantSpec> weights{};
  /// Rank of the corrections lora_A, lora_B beside every packed weight (less where a side of the weight is shorter);
  /// 0: there are none.
  int64_t lora_rank = 0;
  std::optional<QuantSpec> input_activations{};   ///< the four input points of a block; one scale a token
  std::optional<QuantSpec> kv_cache{};            ///< one scale a token and head
  std::optional<QuantSpec> head{}, embedding{};   ///< lm_head and model.embed_tokens; a tied pair has the same grid
  int64_t format_version = kFirstWithTransforms;  ///< of what was read; 0: another tool's checkpoint
  /// Sites with an online Hadamard transform in every block, which versions before kFirstWithTransforms name here.
  /// Later ones store each online transform as tensors: see Model::online_kinds.
  std::vector<Site> hadamards{};
  /// Whether `weights` and `input_activations` hold for every linear of every block and all have codes. A native
  /// checkpoint's do; of one by another tool they are what the first quantized linear has.
  bool uniform = true;

  bool operator==(const QuantizationConfig&) const = default;
};

}  // namespace baseq
