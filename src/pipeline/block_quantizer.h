#pragma once

#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "baseq/model/model.h"
#include "baseq/pipeline/job.h"
#include "model_step.h"
#include "open_block.h"
#include "pipeline/activation_ranges.h"
#include "steps.h"

namespace baseq {

/// Names of the streams.
inline constexpr const char* kFullPrecision = "full_precision";
inline constexpr const char* kQuantized = "quantized";

/// Takes the blocks of a model through the passes of a recipe, one after the other, and the activation streams through
/// the blocks.
class BlockQuantizer {
 public:
  struct Options {
    at::TensorOptions compute{};  ///< float32, and the device
    ActivationStorage storage{};  ///< of the streams
    PassOptions pass{};
    uint64_t seed = 0;
    ProgressFn report{};  ///< every event between the start of a block and its end
  };
  /// The states of a block and of those after it that a turn works on, see end_of_turn().
  using States = std::vector<BlockState>;
  /// A block between two steps.
  struct StepEnd {
    int64_t num_steps = 0;                 ///< that are done
    std::string name;                      ///< the last one, for messages
    std::map<std::string, Tensor> states;  ///< see states_tensors
  };
  /// A block after all steps of a pass.
  struct Result {
    States states;
    DecoderLayer layer;  ///< the block, with its corrections merged
  };

  /// Model and recipe must outlive this.
  /// @param windows of all processes; may be undefined
  BlockQuantizer(const Model& model, const Recipe& recipe, const Tensor& windows, Options options);

  /// passes_with_blocks_last() of the recipe's.
  const std::vector<Pass>& passes() const { return passes_; }
  int64_t num_passes() const { return static_cast<int64_t>(passes_.size()); }
  const Transform& residual() const { return residual_; }
  /// From the next start() on: what was learned in place of the identity of a "matrix" at the residual stream.
  void set_residual_matrix(const Tensor& matrix) {
    residual_ = residual_transform(recipe_, model_.config(), matrix.device(), matrix);
  }
  const Grids& grids() const { return grids_; }
  /// Puts the streams before the first block; to be called for each pass.
  /// @param embedding the rows of the quantized model's table by token ids, [..., hidden_size]
  void start(const std::function<Tensor(const Tensor& ids)>& embedding);
  /// The streams by name, to be stored and filled again between two blocks; empty when there is no calibration.
  std::map<std::string, Tensor*> streams();
  /// Takes the full-precision stream through a block, to the same bits as quantize() does.
  void pass_full_precision(int64_t block);

  /// The end of the blocks that change when it is the turn of `block`: those of the windows that begin there.
  int64_t end_of_turn(int64_t pass, int64_t block) const;
  /// The inverse of states_tensors().
  States states_from(const std::map<std::string, Tensor>& tensors, int64_t block, int64_t end) const;

  /// Takes a block through the steps of a pass, with it those after it that share a window, and the streams through the
  /// block.
  /// @param states     up to end_of_turn(), from the pass before and from earlier windows
  /// @param reached    what an earlier attempt gave `step_ended` last; the rest is done to the same bits
  /// @param step_ended called after each long step that another long one follows; may be empty
  Result quantize(int64_t pass, int64_t block, States states, std::optional<StepEnd> reached = {},
                  const std::function<void(const StepEnd&)>& step_ended = {});

  /// Takes the state of the model through the steps of a pass over the model; to be called after start().
  void learn_model(int64_t pass, ModelState& state, const std::function<Heads(at::ScalarType products)>& heads);

  /// Of the streams: median over tokens of |quantized - full|^2 / |full|^2; NaN when there is no calibration.
  double stream_error() const;

 private:
  int64_t num_blocks() const { return model_.config().num_hidden_layers; }
  DecoderLayer read_block(int64_t block) const;
  DecoderLayer in_stream_basis(DecoderLayer layer) const { return in_basis(std::move(layer), residual_); }
  DecoderLayer in_basis(DecoderLayer layer, const Transform& residual) const;
  /// A block after the one whose turn it is, in its windows.
  struct Ahead {
    Grids grids;
    BlockPlace place;
    OpenBlock open;
  };
  static States states_of(const OpenBlock& first, const std::deque<Ahead>& ahead);
  /// @param states gives those after the first one away
  std::deque<Ahead> open_ahead(int64_t block, States& states);
  void learn_window(const LearnStep& step, OpenBlock& first, std::deque<Ahead>& ahead, int64_t end,
                    const BlockTask& task);
  const Tensor& target_after(std::deque<Ahead>& ahead, int64_t block, int64_t end);
  DecoderLayer finish(OpenBlock& open, int64_t block, bool last_pass,
                      const std::map<std::string, ActivationRange>& before);
  Tensor measured(const Tensor& stream) const;
  std::map<std::string, ActivationRange> original_ranges(const DecoderLayer& layer) const;
  Tensor weigh_tokens(const DecoderLayer& original, int64_t block, bool quiet,
                      std::map<std::string, ActivationRange>* ranges);

  const Model& model_;
  const Recipe& recipe_;
  Options options_;
  Tensor windows_;  ///< of this process; undefined: there is no calibration
  Grids grids_;
  std::vector<Pass> passes_;
  GptqOptions rounding_;
  Transform residual_;  ///< empty: the residual stream keeps its basis
  BlockInputs streams_;
  Tensor target_;  ///< the full-precision stream after the block
  Tensor ahead_;   ///< the same after the blocks up to ahead_end_; undefined: no window has asked for it
  int64_t ahead_end_ = 0;
};

}  // namespace baseq
