#pragma once

#include "baseq/model/config.h"
#include "baseq/pipeline/job.h"
#include "baseq/pipeline/recipe.h"

namespace baseq {

/// Settings that determine the size of a run, in addition to model and recipe.
struct RunShape {
  int64_t num_windows = 0, seq_len = 0;  ///< 0 windows: no calibration
  // Of the process that needs most:
  int64_t num_elsewhere = 0;     ///< of the windows, those that other processes have
  int64_t num_sums = 1;          ///< partial sums of a moment that it holds at a time, see TreeSum
  bool gathers_streams = false;  ///< receives the streams of the others, for the work directory
  int64_t tokens_per_batch = 2048;
  bool activations_on_disk = false;
  bool on_device = false;          ///< blocks are computed in the memory of another device than the CPU
  bool streams_on_device = false;  ///< activation streams as well
  at::ScalarType checkpoint_dtype = at::kBFloat16;
};

/// Memory of the host that quantize() needs at its peak; the stage of a block that needs most is one part.
Footprint quantization_memory(const ModelConfig& config, const Recipe& recipe, const RunShape& shape);

/// The same of the device of a run with `on_device`.
Footprint quantization_device_memory(const ModelConfig& config, const Recipe& recipe, const RunShape& shape);

/// Bytes of the quantized checkpoint but for side files: of all blocks, and of what surrounds them. Rather too much
/// than too little: what learning may put there counts.
struct OutputBytes {
  int64_t blocks = 0, surroundings = 0;
};
OutputBytes output_bytes(const ModelConfig& config, const Recipe& recipe, at::ScalarType checkpoint_dtype);

/// Bytes that a work directory keeps in addition to blocks and streams: the state of a block between two steps, and
/// those of all blocks from earlier passes.
int64_t stage_bytes(const ModelConfig& config, const Recipe& recipe);

/// Of the activations of a forward pass through one block over `num_tokens` tokens.
int64_t forward_bytes(const ModelConfig& config, int64_t num_tokens);

/// The program itself, LibTorch and its buffers.
inline constexpr int64_t kProcessBytes = int64_t{256} << 20;

}  // namespace baseq
