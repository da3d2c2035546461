#pragma once

#include <functional>
#include <string>
#include <vector>

#include "realize.h"

namespace baseq {

/// Something about a block that a step learns.
struct Parameter {
  /// What of a rounded weight it changes; of kNothing it cannot be learned once weights are rounded.
  enum class OfRounded { kNothing, kGrid, kCodes, kCorrection };

  std::string name;                          ///< "value.matrix", "k_cache.clip", "mlp.down_proj.low_rank"
  std::vector<Tensor> leaves;                ///< they require gradients
  double rate = 1;                           ///< first learning rate
  double epsilon = 1e-8;                     ///< Adam's, which should be small next to the gradients
  std::function<void(BlockState&)> write{};  ///< puts the current values into a state; differentiable
  bool orthogonal = false;                   ///< a matrix that Cayley SGD moves and keeps orthogonal
  /// Called before each epoch, from 0, where learning changes with time: it may only add freedom. May be empty.
  std::function<void(int64_t epoch, int64_t num_epochs)> begin_epoch{};
  std::vector<std::string> reaches{};  ///< linears whose weights depend on it
  bool moves = false;                  ///< whether their exact weights do, not only how they are rounded
  bool of_model = false;               ///< whether it belongs to the model and not to the state of a block
  bool on_norm = false;                ///< whether it changes the weight of a norm
  bool on_activations = false;         ///< a scale at down: while it is learned, it multiplies activations
  OfRounded of_rounded = OfRounded::kNothing;
  std::function<void()> project{};  ///< puts the leaves back into their range after a step; may be empty
};

/// Clips are learned through a sigmoid; a start at exactly 1 would have no gradient.
inline constexpr double kLargestClip = 0.999;

/// A copy of `value` that requires gradients.
Tensor new_leaf(const Tensor& value);

/// The parameters that `step.rates` names, at the values that `state` has. Scales are learned as logarithms, clips as
/// logits, factors of transforms as transform_leaves() says, so that no value can leave its range.
/// Throws c10::Error for a key of the rates that names nothing in this block, and for two that move one factor.
/// @param seed of the starts that are random
std::vector<Parameter> make_parameters(const LearnStep& step, const BlockState& state, const BlockPlace& place,
                                       const Grids& grids, uint64_t seed = 0);

}  // namespace baseq
