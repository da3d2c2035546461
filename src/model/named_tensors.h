#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "baseq/io/checkpoint.h"
#include "baseq/model/config.h"

namespace baseq {

/// The tensors of a checkpoint under the names that LlamaForCausalLM gives them, however the checkpoint spells them:
/// without the prefix "model.", or with q, k, v in one qkv_proj and gate, up in one gate_up_proj.
class NamedTensors {
 public:
  /// @param fused whether the checkpoint holds the fused projections
  NamedTensors(Checkpoint checkpoint, const ModelConfig& config, bool fused);

  bool contains(std::string_view name) const;
  /// As stored, on the CPU, a read-only view of the file. Throws c10::Error naming what is missing, is not floating
  /// point (packed and quantized weights are read by their own names), or has rows of another number than config.json
  /// says.
  Tensor tensor(std::string_view name) const;
  /// Type and sizes of tensor(), without its data; throws as that does.
  TensorInfo info(std::string_view name) const;
  /// How the checkpoint spells `name`: what a message about it says.
  std::string stored_name(std::string_view name) const;

 private:
  struct Location {
    std::string name;                     ///< in the checkpoint
    int64_t first_row = 0, num_rows = 0;  ///< of a fused projection
    int64_t total_rows = 0;               ///< 0: the tensor as a whole
  };
  struct Part {
    std::string name;  ///< of a linear, such as "self_attn.q_proj."
    Location fused;    ///< where its rows are
  };
  Location locate(std::string_view name) const;

  Checkpoint checkpoint_;
  bool prefixed_;
  std::vector<Part> parts_;  ///< of fused projections
};

}  // namespace baseq
