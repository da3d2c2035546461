#include "block_walk.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <utility>

namespace baseq {
namespace {

// The parts of DecoderLayer::forward; a test holds them to its bits.

Tensor add_to_residual(const DecoderLayer& layer, const Tensor& residual, const Tensor& branch) {
  return layer.residual_multiplier == 1 ? residual + branch : residual + branch * layer.residual_multiplier;
}

Tensor gate_up_input(const DecoderLayer& layer, const Tensor& middle) {
  const Tensor normed = layer.post_attention_layernorm.forward(middle);
  return layer.mlp.input.forward(apply_transform(layer.mlp.input_transform, normed));
}

Tensor down_input(const DecoderLayer& layer, const Tensor& middle) {
  return layer.mlp.down_input.forward(layer.mlp.gated(gate_up_input(layer, middle)));
}

}  // namespace

void BlockWalk::visit(Site site, const DecoderLayer& layer, const std::function<void(int64_t, const Tensor&)>& fn) {
  const BlockInputs& inputs = task_.inputs;
  const at::TensorOptions compute = inputs.compute();
  if (site == Site::kDown) return visit_mlp(layer, fn);
  if (site == Site::kO) heads_ = allocate(layer.self_attn.num_heads * layer.self_attn.head_dim);
  if (site == Site::kGateUp) {
    const bool fits = heads_.size(2) == inputs.quantized.size(2);
    after_attention_ = fits ? heads_ : allocate(inputs.quantized.size(2));
  }
  const auto pass = [&](int64_t begin, const Tensor& windows) {
    const auto part = [&](const Tensor& stream) { return stream.narrow(0, begin, windows.size(0)); };
    if (site == Site::kGateUp) {
      const Tensor heads = part(heads_).to(compute);
      const Tensor middle = add_to_residual(layer, windows, layer.self_attn.o_proj.forward(heads));
      part(after_attention_).copy_(middle);
      return fn(begin, gate_up_input(layer, middle));
    }
    const Tensor x = layer.input_of(site, windows, inputs.rope);
    if (site == Site::kO) part(heads_).copy_(x);
    fn(begin, x);
  };
  for_each_batch(inputs.quantized, compute, pass, inputs.pass);
  if (site == Site::kGateUp) heads_ = Tensor();
}

/// In half batches, because the moments of the widest input are in memory too.
void BlockWalk::visit_mlp(const DecoderLayer& layer, const std::function<void(int64_t, const Tensor&)>& fn) {
  PassOptions halves = task_.inputs.pass;
  halves.tokens_per_batch = (halves.tokens_per_batch + 1) / 2;
  const auto pass = [&](int64_t begin, const Tensor& middle) { fn(begin, down_input(layer, middle)); };
  for_each_batch(after_attention_, task_.inputs.compute(), pass, halves);
}

Tensor BlockWalk::allocate(int64_t features) const {
  const Tensor& stream = task_.inputs.quantized;
  const std::vector<int64_t> shape{stream.size(0), stream.size(1), features};
  const at::ScalarType dtype = task_.inputs.compute().dtype().toScalarType();
  if (dtype != at::kFloat) return at::empty(shape, stream.options().dtype(dtype));
  // Not in the type of the streams: a pass that does not stop here rounds nothing either.
  return ActivationStorage{.dtype = dtype, .directory = task_.storage.directory, .device = task_.storage.device}
      .allocate(shape);
}

Tensor after_attention(const DecoderLayer& layer, const Tensor& windows, const RotaryEmbedding& rope) {
  return add_to_residual(layer, windows, layer.self_attn.o_proj.forward(layer.input_of(Site::kO, windows, rope)));
}

void advance_mlp(const DecoderLayer& layer, const Tensor& middle, const Tensor& to, const RotaryEmbedding& rope,
                 const PassOptions& options) {
  const c10::NoGradGuard no_grad;
  const auto pass = [&](int64_t begin, const Tensor& windows) {
    const Tensor branch = layer.mlp.down_proj.forward(down_input(layer, windows));
    to.narrow(0, begin, windows.size(0)).copy_(add_to_residual(layer, windows, branch));
  };
  for_each_batch(middle, rope.cos.options(), pass, options);
}

}  // namespace baseq
