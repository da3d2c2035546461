#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>

#include "baseq/pipeline/job.h"
#include "pipeline/activations.h"
#include "pipeline/statistics.h"
#include "realize.h"

namespace baseq {

/// The surroundings of the block that a step works on.
struct BlockTask {
  BlockPlace place;
  const Grids& grids;
  GptqOptions rounding{};     ///< of the recipe's round step
  const BlockInputs& inputs;  ///< undefined without calibration
  Tensor target;              ///< the full-precision block's output, [num_samples, seq, hidden_size]
  Tensor token_weights;       ///< [num_samples, seq], mean 1; see token_weights()
  uint64_t seed = 0;
  ProgressFn report{};          ///< may be empty
  ActivationStorage storage{};  ///< of what is kept of all windows

  const Tensor& stream(Stream stream) const {
    return stream == Stream::kQuantized ? inputs.quantized : inputs.full_precision;
  }
  void tell(const ProgressEvent& event) const {
    if (report) report(event);
  }
};

/// The block that the steps of a recipe work on: its state, and what follows from it, computed when it is asked for.
class OpenBlock {
 public:
  /// @param read_original gives the block in the basis of the residual stream; called again after forget_original()
  OpenBlock(BlockState state, BlockPlace place, std::function<DecoderLayer()> read_original);

  const BlockState& state() const { return state_; }
  /// Changes the state in any way: `edit(state)`.
  void edit(const std::function<void(BlockState&)>& edit);
  /// Changes nothing but the quant points, which costs nothing. Moments stay, for they are taken with the points off.
  void edit_points(const std::function<void(BlockState&)>& edit);
  /// Adds what was decided about a linear to the state and gives layer() the rounded weight.
  void round(const std::string& name, WeightState weight);

  const DecoderLayer& original();
  /// Gives its memory back. layer() stays as it is.
  void forget_original() { original_.reset(); }
  /// realize(original(), state())
  const DecoderLayer& layer();
  /// layer(), which is not held any longer: the next call makes it again.
  DecoderLayer release_layer();
  /// measure_block() of layer() at the sites up to `last`; one pass serves the steps that follow each other.
  const BlockMoments& moments(const BlockTask& task, Stream stream, Site last);
  /// To be called after a change that moments() does not look past: of a gain.
  void forget_moments() { measured_.reset(); }
  /// What a step saw of the quantized stream on its way through layer(), for who passes it next. Every change of the
  /// block ends it.
  struct Passed {
    Tensor after_attention;                         ///< the residual stream there; undefined: not known
    std::map<std::string, ActivationRange> ranges;  ///< see activation_ranges()
  };
  void keep_passed(Passed passed) { passed_ = std::move(passed); }
  Passed take_passed() { return std::exchange(passed_, {}); }
  /// Ends the work: layer() without a copy.
  DecoderLayer take_layer();

 private:
  BlockState state_;
  BlockPlace place_;
  std::function<DecoderLayer()> read_original_;
  std::optional<DecoderLayer> original_, layer_;
  struct Measured {
    Stream stream;
    Site last;
    BlockMoments moments;
  };
  std::optional<Measured> measured_;
  Passed passed_;
};

}  // namespace baseq
