#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>

#include "baseq/model/model.h"
#include "baseq/pipeline/activation_ranges.h"
#include "baseq/pipeline/quantize_checkpoint.h"

namespace baseq {

/// Names of the streams.
inline constexpr const char* kFullPrecision = "full_precision";
inline constexpr const char* kQuantized = "quantized";

/// What a block is after one of its stages, see layer_state.
struct StageEnd {
  std::string stage;
  std::map<std::string, Tensor> layer;
};

/// Takes the blocks of a model from full precision to their quantized form, one after the other, and the activation
/// streams through them.
class BlockQuantizer {
 public:
  struct Options {
    at::TensorOptions compute;  ///< float32, and the device
    ActivationStorage storage;  ///< of the streams
    PassOptions pass;
    uint64_t seed = 0;
    ProgressFn report;  ///< every event between the start of a block and its end
  };

  /// All but the options must outlive this. `windows` may be undefined.
  BlockQuantizer(const Model& model, const Recipe& recipe, const Tensor& windows, Options options);

  /// Puts the streams before the first block.
  /// @param embedding as the quantized model has it, [vocab_size, hidden_size]
  void start(const Tensor& embedding);
  /// The streams by name, to be stored and filled again between two blocks; empty when there is no calibration.
  std::map<std::string, Tensor*> streams();
  /// Takes the full-precision stream through a block, to the same bits as quantize() does.
  void pass_full_precision(int64_t block);

  /// Quantizes a block and takes the streams behind it.
  /// @param reached what an earlier attempt gave `stage_ended` last; it goes on from there to the same bits
  /// @param stage_ended called after each stage that another one follows, if both take long; may be empty
  DecoderLayer quantize(int64_t block, std::optional<StageEnd> reached = {},
                        const std::function<void(const StageEnd&)>& stage_ended = {});

  /// Of the streams: median over tokens of |quantized - full|^2 / |full|^2; NaN when there is no calibration.
  double stream_error() const;

 private:
  DecoderLayer read_block(int64_t block) const;
  DecoderLayer in_stream_basis(DecoderLayer layer) const;
  Tensor measured(const Tensor& stream) const;
  std::map<std::string, ActivationRange> original_ranges(const DecoderLayer& layer) const;
  void transform(DecoderLayer& layer, const struct LearningTask& task) const;
  void round(DecoderLayer& layer, const struct LearningTask& task) const;

  const Model& model_;
  const Recipe& recipe_;
  const Tensor& windows_;
  Options options_;
  BlockInputs streams_;
  Tensor target_;  ///< the full-precision stream after the block
};

}  // namespace baseq
