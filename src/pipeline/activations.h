#pragma once

#include <filesystem>
#include <functional>

#include "baseq/model/decoder_layer.h"
#include "baseq/pipeline/job.h"
#include "cluster/shards.h"

namespace baseq {

/// Where the activation streams of a run live: beside one block, they are the largest thing that it holds.
struct ActivationStorage {
  /// A residual stream leaves the range of float16.
  static constexpr at::ScalarType kDtypes[] = {at::kFloat, at::kBFloat16};
  at::ScalarType dtype = at::kFloat;  ///< one of kDtypes
  /// Empty: in host memory. Otherwise in mapped files of this directory, which have no name once they are open and so
  /// vanish with the process.
  std::filesystem::path directory{};
  at::Device device = at::kCPU;  ///< without a directory: in the memory of this device

  /// Uninitialized memory. Throws c10::Error when the file cannot be made or the disk has no room for all of it.
  Tensor allocate(at::IntArrayRef sizes) const;
};

/// How the stages of a block go over the streams.
struct PassOptions {
  int64_t tokens_per_batch = kTokensPerBatch;
  /// Called before each step: a batch of a pass, a linear that is rounded, a step of the optimizer. What it throws ends
  /// the stage there. May be empty.
  std::function<void()> before_step{};
  /// Of the products in a pass over the streams: those of the blocks and second moments.
  MatmulPrecision matmul_precision = MatmulPrecision::kHighest;
  Shards shards{};  ///< what of the windows the streams of this process are

  void step() const {
    if (before_step) before_step();
  }
};

/// The two activation streams at the input of one block, [num_samples, seq, hidden_size]: as the full-precision prefix
/// and as the already quantized prefix produce them. They are on the host or on the block's device, which is that of
/// `rope`. Of several processes each has its own windows, see PassOptions::shards.
struct BlockInputs {
  Tensor full_precision;
  Tensor quantized;
  RotaryEmbedding rope;
  PassOptions pass;

  bool defined() const { return quantized.defined(); }
  /// What a block computes with, whatever the streams are stored in.
  at::TensorOptions compute() const { return rope.cos.options(); }
};

/// So many tokens are enough to compare or to describe what a block does.
inline constexpr int64_t kMeasuredTokens = 2048;

/// The first windows of a stream [n, seq, ..], or of what else there is for each of them: about so many tokens, at
/// least one window, and no more than the first shard. All processes get those of the first one.
Tensor first_windows(const Tensor& stream, const Shards& shards, int64_t tokens = kMeasuredTokens);

/// fn(begin, windows) over consecutive slices [<= batch, seq, hidden] of a stream, converted to `compute`; at least one
/// window each, and none of two shards.
void for_each_batch(const Tensor& stream, const at::TensorOptions& compute,
                    const std::function<void(int64_t begin, const Tensor& windows)>& fn,
                    const PassOptions& options = {});

/// Writes `from` after `layer` to `to`, a stream of the same shape, which may be `from` itself.
void advance(const DecoderLayer& layer, const Tensor& from, const Tensor& to, const RotaryEmbedding& rope,
             const PassOptions& options = {});

}  // namespace baseq
