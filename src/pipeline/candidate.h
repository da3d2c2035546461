#pragma once

#include <map>
#include <set>
#include <string>
#include <vector>

#include "open_block.h"
#include "parameters.h"

namespace baseq {

/// A weight with straight-through rounding. Without a learned clip the ratios are searched.
class StraightThrough {
 public:
  StraightThrough(const QuantSpec& spec, const GptqOptions& options);

  /// @param clip   [out_features, groups, 1]; undefined: what was searched last
  /// @param search whether to search anew
  Tensor forward(const Tensor& weight, const Tensor& clip, bool search);

 private:
  void search_ratio(const Tensor& weight);

  QuantSpec spec_;
  GptqOptions options_;
  Tensor ratio_;  ///< [out_features, groups, 1]
};

/// A block as a function of the parameters that a step learns.
class Candidate {
 public:
  /// Whether a forward pass is for a step of the optimizer, or compares states.
  /// kAgain: the same step of the optimizer as the pass before.
  enum class Phase { kLearning, kAgain, kMonitoring };
  /// What stays between two forward passes: the weights of a block, or where there are codes nothing but these.
  enum class Holds { kWeights, kCodes };

  /// `step` and `task` must outlive this.
  /// @param shared parameters that belong to more than this block
  Candidate(const LearnStep& step, OpenBlock& block, const BlockTask& task, Holds holds = Holds::kWeights,
            const std::vector<Parameter>& shared = {});

  const std::vector<Parameter>& parameters() const { return parameters_; }
  /// Whether a parameter changes more than the quant points.
  bool reaches_weights() const { return changes_sites_ || changes_weights_; }
  /// To be called before each step of the optimizer: in every tenth the first build() for learning searches clips anew.
  void begin_step();
  /// Whether that build() is still to come.
  bool search_is_due() const { return search_is_due_; }
  /// The block with the current values; weights are in the dtype of the products. Differentiable.
  DecoderLayer build(Phase phase);
  /// The state with the current values, for good.
  BlockState result() const;

 private:
  /// A linear whose weight depends on a parameter.
  struct Reached {
    Linear exact;        ///< with its exact weight, where no parameter moves that; without what is learned to be added
    bool moves = false;  ///< a parameter does
    Tensor in_cells;     ///< the weight whose codes are learned, see nearest_in_cells; undefined: they stay
    std::optional<StraightThrough> rounding;
    Tensor feedback_clip;  ///< share of each range that the grid next to a low-rank correction covers
  };

  void reach(const std::string& name, const Parameter& parameter);
  void hold(DecoderLayer layer, Holds holds);
  Tensor weight_of(const std::string& name, Reached& reached, const Tensor& exact, const BlockState& current,
                   bool search) const;

  const LearnStep& step_;
  const BlockTask& task_;
  BlockState state_;            ///< where the step starts
  SplitTransforms transforms_;  ///< of state_
  std::vector<Parameter> parameters_;
  DecoderLayer base_;      ///< linears that no parameter reaches are final, in the dtype of the products
  DecoderLayer original_;  ///< with norms where a parameter changes sites, with linears where it reaches a weight
  bool changes_sites_ = false, changes_weights_ = false;
  std::set<std::string> from_codes_;  ///< linears whose weight is made of the codes in each pass
  std::map<std::string, Reached> reached_;
  Tensor start_down_scale_;  ///< undefined unless a scale at down is learned
  int64_t steps_ = 0;
  bool search_is_due_ = false;
};

}  // namespace baseq
