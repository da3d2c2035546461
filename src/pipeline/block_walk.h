#pragma once

#include <functional>
#include <map>
#include <string>

#include "open_block.h"

namespace baseq {

/// The way of the quantized stream through a block whose linears are being rounded. What the readers of one site see
/// begins where the site before ended and not at the input of the block: for all windows, first the inputs of o_proj
/// are kept, and then the residual stream after attention.
class BlockWalk {
 public:
  explicit BlockWalk(const BlockTask& task) : task_(task) {}

  /// fn(begin, x) over batches of windows with what the readers of `site` see, [windows, seq, features]. To be called
  /// for kQkv, kO, kGateUp and kDown in this order; what stands before a site in `layer` must not change after its
  /// call.
  void visit(Site site, const DecoderLayer& layer, const std::function<void(int64_t begin, const Tensor& x)>& fn);

  /// The residual stream after attention, float32 [num_samples, seq, hidden_size]; undefined before kGateUp.
  const Tensor& after_attention() const { return after_attention_; }

 private:
  void visit_mlp(const DecoderLayer& layer, const std::function<void(int64_t, const Tensor&)>& fn);
  Tensor allocate(int64_t features) const;

  const BlockTask& task_;
  Tensor heads_, after_attention_;
};

/// The first half of advance(): the residual stream after attention.
Tensor after_attention(const DecoderLayer& layer, const Tensor& windows, const RotaryEmbedding& rope);
/// The second half of advance(): writes the block's output to `to`.
/// @param middle the residual stream after attention
void advance_mlp(const DecoderLayer& layer, const Tensor& middle, const Tensor& to, const RotaryEmbedding& rope,
                 const PassOptions& options);

}  // namespace baseq
