#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "baseq/model/decoder_layer.h"
#include "baseq/pipeline/recipe.h"

namespace baseq {

/// How the codes of a weight are learned: those of `source + change + offset * scale`.
struct LearnedCodes {
  Tensor offset;  ///< in steps of the grid, [out_features, in_features]; undefined: 0
  Tensor change;  ///< [out_features, in_features]; undefined: 0
  bool defined() const { return offset.defined() || change.defined(); }
};

/// Decisions about the weight of one linear.
struct WeightState {
  Tensor clip;  ///< learned share of each range, [out_features, groups, 1 or 2], see compute_qparams; undefined: none
  LowRankFactors added;                  ///< what was learned to be added before it is rounded; may be undefined
  std::optional<QuantizedWeight> codes;  ///< once it is rounded
  LowRankFactors low_rank;               ///< a correction next to the codes; may be undefined
  LearnedCodes learned;                  ///< what moves the codes, only while a step learns it

  /// What comes before rounding.
  WeightState unrounded() const { return {.clip = clip, .added = added}; }
  /// The weight that is rounded, differentiable. @param exact with the transforms of the block
  Tensor before_rounding(const Tensor& exact) const { return added.defined() ? exact.add(added.product()) : exact; }
};

/// The decisions of a recipe's steps about a block so far. A block is its original weights and this state, see
/// realize(): no step destroys what a later one may need, and a state describes a valid block at every moment.
struct BlockState {
  std::map<Site, Transform> transforms;        ///< of every site but kResidual, which belongs to the whole model
  std::map<Site, QuantPoint> points;           ///< those that are on
  std::map<Site, Tensor> norms;                ///< learned factors of the weights of the norms before sites, [features]
  std::map<std::string, WeightState> weights;  ///< by linear
};

/// The last factor of this kind in the transform of `site`; nullptr if it has none.
Factor* find_factor(BlockState& state, Site site, Factor::Kind kind);
/// Whether a weight of the block is rounded.
bool has_codes(const BlockState& state);

/// The state as tensors, for a journal. They share memory with `state` where that is contiguous and on the host.
std::map<std::string, Tensor> state_tensors(const BlockState& state);
/// The same of consecutive blocks, together: names of the first as they are, others with their distance from it.
std::map<std::string, Tensor> states_tensors(const std::vector<BlockState>& states);
/// Takes the tensors of the state of such a block out of `tensors` and gives them the names of state_tensors().
/// @param distance at least 1
std::map<std::string, Tensor> take_state_tensors(std::map<std::string, Tensor>& tensors, int64_t distance);
/// The inverse of state_tensors. The tensors are copied.
/// @param grids  what the state was made with, see Grids::in_block()
/// Throws c10::Error naming what is missing.
BlockState state_from_tensors(const std::map<std::string, Tensor>& tensors, const Grids& grids, at::Device device);

}  // namespace baseq
