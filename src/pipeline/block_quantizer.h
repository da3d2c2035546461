#pragma once

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
  /// A block between two steps.
  struct StepEnd {
    int64_t num_steps = 0;  ///< that are done
    std::string name;       ///< the last one, for messages
    std::map<std::string, Tensor> state;
  };
  /// A block after all steps of a pass.
  struct Result {
    BlockState state;
    DecoderLayer layer;  ///< with its corrections merged
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

  /// Takes a block through the steps of a pass, and the streams through the block.
  /// @param state      from the pass before
  /// @param reached    what an earlier attempt gave `step_ended` last; the rest is done to the same bits
  /// @param step_ended called after each long step that another long one follows; may be empty
  Result quantize(int64_t pass, int64_t block, BlockState state, std::optional<StepEnd> reached = {},
                  const std::function<void(const StepEnd&)>& step_ended = {});

  /// Takes the state of the model through the steps of a pass over the model; to be called after start().
  void learn_model(int64_t pass, ModelState& state, const std::function<Heads(at::ScalarType products)>& heads);

  /// Of the streams: median over tokens of |quantized - full|^2 / |full|^2; NaN when there is no calibration.
  double stream_error() const;

 private:
  DecoderLayer read_block(int64_t block) const;
  DecoderLayer in_stream_basis(DecoderLayer layer) const { return in_basis(std::move(layer), residual_); }
  DecoderLayer in_basis(DecoderLayer layer, const Transform& residual) const;
  Result finish(OpenBlock& open, int64_t block, bool last_pass, const std::map<std::string, ActivationRange>& before);
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
};

}  // namespace baseq
