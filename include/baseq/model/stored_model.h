#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "baseq/io/checkpoint.h"
#include "baseq/model/config.h"
#include "baseq/model/site.h"
#include "baseq/quant/quantize.h"

#pragma GCC visibility push(default)
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
  static constexpr int64_t kFormatVersion = 7;        ///< the newest that is read
  static constexpr int64_t kOldestFormatVersion = 3;  ///< 4 added factors of 8 bits, 5 tensors of online transforms
  static constexpr int64_t kFirstWithTransforms = 5;
  static constexpr int64_t kFirstWithHead = 6;       ///< and embedding; written only where one of them is quantized
  static constexpr int64_t kFirstWithOverrides = 7;  ///< written only where there are any
  static constexpr int64_t kFirstWithRuntime = 7;    ///< written only where a point is smoothed at run time

  std::optional<QuantSpec> weights{};
  /// Grids of single linears in place of `weights`, by full name.
  std::map<std::string, std::optional<QuantSpec>> overrides{};
  /// Rank of the corrections lora_A, lora_B beside every packed weight (less where a side of the weight is shorter);
  /// 0: there are none.
  int64_t lora_rank = 0;
  std::optional<QuantSpec> input_activations{};   ///< the four input points of a block; one scale a token
  std::optional<QuantSpec> kv_cache{};            ///< one scale a token and head
  std::optional<QuantSpec> head{}, embedding{};   ///< lm_head and model.embed_tokens; a tied pair has the same grid
  std::map<Site, RuntimeSmooth> runtime{};        ///< input points that are smoothed at run time, in every block
  int64_t format_version = kFirstWithTransforms;  ///< of what was read; 0: another tool's checkpoint
  /// Sites with an online Hadamard transform in every block, which versions before kFirstWithTransforms name here.
  /// Later ones store each online transform as tensors: see Model::online_kinds.
  std::vector<Site> hadamards{};
  /// Whether `weights` and `input_activations` hold for every linear of every block and all have codes. A native
  /// checkpoint's do unless it has overrides; of one by another tool they are what the first quantized linear has.
  bool uniform = true;

  bool operator==(const QuantizationConfig&) const = default;
};

/// An online transform as a checkpoint stores it.
struct StoredTransform {
  std::vector<Factor::Kind> kinds{};  ///< of its factors, in order
  std::vector<std::string> names{};   ///< of the tensors that it may have; those of inverses need not be there
  std::function<Transform()>
      read{};  ///< float32 on the CPU; throws c10::Error naming the tensor that is no such factor
};

/// A checkpoint of any tool, open: its tensors under Hugging Face's names, and how Model reads them. open_model makes
/// one of a path. Copies share the mapped files.
///
///     const StoredModel stored = open_model("Qwen3-0.6B-Q8_0.gguf");
///     std::cout << stored.format << ", " << stored.config.num_hidden_layers << " blocks\n";
struct StoredModel {
  /// An original or a native checkpoint: formats/native/read.cpp. Throws c10::Error naming what config.json lacks, or
  /// another tool's method, or a tensor of an online transform that this version does not know.
  StoredModel(Checkpoint checkpoint);  // NOLINT(google-explicit-constructor): every such checkpoint is a stored model
  /// A checkpoint quantized by another tool. `format_of` is asked for every linear of the blocks, by full name, and for
  /// lm_head; the dtype of the scales and whether groups are scattered come from the tensors.
  /// Throws c10::Error naming what Model does not execute.
  StoredModel(Checkpoint checkpoint, std::string format,
              const std::function<LinearFormat(const std::string& linear)>& format_of);

  Checkpoint tensors;
  std::string format = "original";  ///< or "baseq", "compressed-tensors", "gptq", "awq", "gguf"
  ModelConfig config;
  std::optional<QuantizationConfig> quantization;              ///< absent in full precision
  std::map<std::string, LinearFormat> linears;                 ///< what is quantized, by full name; the embedding too
  std::map<std::pair<int64_t, Site>, StoredTransform> online;  ///< by block and site; of a native checkpoint
  std::map<std::string, int64_t> bytes_by_type;  ///< of a GGUF file: the bytes of the tensors of each type
};

}  // namespace baseq
#pragma GCC visibility pop
