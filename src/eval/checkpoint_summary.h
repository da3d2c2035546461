#pragma once

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "baseq/model/model.h"
#include "quant/describe_spec.h"

namespace baseq {

/// What a linear takes in a checkpoint: codes, scales, zero points, padding and low-rank corrections, not its bias.
struct StoredBits {
  double bits = 0, weights = 0;

  double per_weight() const { return weights > 0 ? bits / weights : 0; }
};

/// Of every linear of the blocks, by the full name that the checkpoint has for it.
std::map<std::string, StoredBits> stored_bits(const StoredModel& model);

/// What stands in a row about a checkpoint before it is evaluated.
struct CheckpointSummary {
  std::string name;     ///< see model_name()
  std::string format;   ///< see StoredModel
  std::string recipe;   ///< its name; empty: not quantized, or unnamed
  std::string weights;  ///< describe() of the grids
  std::string input_activations, kv_cache;
  int64_t num_bytes = 0;  ///< of all weight files
  double bits_per_weight = 0;
  std::map<std::string, StoredBits> linears{};  ///< see stored_bits()
  bool uniform = true;                          ///< all of them have the same grid
};

/// The online transforms by their sites, such as "hadamard at qkv, gate_up; scale, hadamard at down"; "nothing".
std::string describe_online(const Model& model);

/// Which linears have which grid, the most common one first, such as {"4 bits, symmetric, per channel", "12 linears"},
/// {"full precision", "mlp.up_proj, mlp.down_proj in blocks 0, 3-5"}.
std::vector<std::pair<std::string, std::string>> describe_linears(const StoredModel& model);

/// Stored bits a weight of all of these.
double bits_per_weight(const StoredModel& model);

/// Reads headers, and the shapes of packed matrices.
CheckpointSummary summarize(const Model& model);

}  // namespace baseq
