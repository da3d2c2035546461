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
#include "baseq/model/quantization_config.h"

namespace baseq {

/// An online transform as a checkpoint stores it.
struct StoredTransform {
  std::vector<Factor::Kind> kinds;  ///< of its factors, in order
  std::vector<std::string> names;   ///< of the tensors that it may have; those of inverses need not be there
  std::function<Transform()> read;  ///< float32 on the CPU; throws c10::Error naming the tensor that is no such factor
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
