#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "baseq/model/config.h"
#include "baseq/model/site.h"
#include "baseq/quant/gptq.h"
#include "baseq/quant/low_rank.h"
#include "baseq/quant/quantize.h"
#include "baseq/tensor.h"

#pragma GCC visibility push(default)
namespace baseq {

/// The frequencies of a rotary embedding for sequences of `seq_len` tokens, as transformers computes them.
struct RotaryFrequencies {
  Tensor inverse{};               ///< [rotary_dim / 2], float32, radians a token
  double attention_factor = 1.0;  ///< of cos and sin
};

/// The features of a head that turn, the first ones.
int64_t rotary_dim(const RopeParameters& rope, int64_t head_dim);

/// Linear and dynamic interpolation, Llama 3's, YaRN (arXiv 2309.00071) or LongRoPE (arXiv 2402.13753). Dynamic and
/// LongRoPE depend on `seq_len`: all positions turn as those of one forward pass over that many tokens.
RotaryFrequencies rotary_frequencies(const RopeParameters& rope, int64_t head_dim, int64_t max_position_embeddings,
                                     int64_t seq_len);

/// Rotary position embedding in the half-split layout: feature i turns with feature i + rotary_dim / 2; features from
/// rotary_dim on pass.
///
///     const RotaryEmbedding rope = RotaryEmbedding::create(model.config(), q.size(1), q.options());
///     const Tensor turned = rope.forward(q);  // [batch, seq, heads, head_dim]
struct RotaryEmbedding {
  Tensor cos{}, sin{};  ///< [seq, rotary_dim]

  /// Angles in float32 as transformers computes them, then cast to the dtype of `options`.
  static RotaryEmbedding create(const ModelConfig& config, int64_t seq_len, const at::TensorOptions& options);
  /// The same of positions first .. first + count - 1.
  static RotaryEmbedding create(const RotaryFrequencies& frequencies, int64_t first, int64_t count,
                                const at::TensorOptions& options);
  Tensor forward(const Tensor& x) const;  ///< x: [batch, seq, heads, head_dim]
};

struct Activations;
struct CachedRows;
class FloatLinear;
class PreparedLinear;

/// The input that several linears share: q, k and v, or gate and up.
class LinearInput {
 public:
  /// Values as they are.
  LinearInput(Tensor values) : values_(std::move(values)) {}  // NOLINT(google-explicit-constructor): most inputs are
  /// The output of `point` for x, computed at the first use. The point must outlive this.
  /// @param x [..., features]
  LinearInput(Tensor x, const QuantPoint& point) : x_(std::move(x)), point_(&point) {}

  /// The values, or the output of the point.
  const Tensor& values() const;
  /// The values as a factor of bfloat16 products, rounded once for all readers.
  const Tensor& bfloat16_factor() const;
  /// The same as integer codes, quantized once for all readers with the same groups of columns.
  /// @param fixed_point_bits 8 or 15, for an input that no point quantizes
  const Activations& codes(const PreparedLinear& reader, int64_t fixed_point_bits) const;
  at::IntArrayRef sizes() const { return (point_ != nullptr ? x_ : values_).sizes(); }

 private:
  mutable Tensor values_;
  Tensor x_;
  const QuantPoint* point_ = nullptr;
  mutable Tensor bfloat16_factor_;
  mutable std::vector<std::shared_ptr<const Activations>> codes_;
};

/// y = x W^T + b. The product is computed in the dtype of the weight, sums in at least float32, and returned in that of
/// x: a layer with bfloat16 weights learns with bfloat16 products and float32 everything else.
struct Linear {
  Tensor weight{};                             ///< [out_features, in_features] in the compute dtype
  Tensor bias{};                               ///< [out_features]; may be undefined
  std::optional<QuantizedWeight> quantized{};  ///< the codes that `weight` was dequantized from
  LowRankFactors lora{};                       ///< a correction next to the codes, part of `weight`; may be undefined
  /// All of the above for integer products, in place of it: see DecoderLayer::prepare. Needs no gradients.
  std::shared_ptr<const PreparedLinear> prepared{};
  std::shared_ptr<const FloatLinear> panels{};  ///< the same of a weight without codes
  int64_t fixed_point_bits = 15;                ///< of what `prepared` reads where no point quantizes it

  Tensor forward(const LinearInput& x) const;
  /// The dequantized codes and the correction, float32: `weight` before its conversion. Only with `quantized`.
  Tensor dequantized() const;
};

/// weight * x / rms(x) over the last dimension.
struct RmsNorm {
  Tensor weight{};  ///< [features]
  double eps = 1e-6;
  bool exact = false;  ///< in the order of docs/arithmetic.md: see DecoderLayer::prepare

  Tensor forward(const Tensor& x) const;
};

/// Causal self-attention with grouped key/value heads.
struct Attention {
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  bool use_rope = true;
  int64_t sliding_window = 0;       ///< tokens that a query sees, itself included; 0: all before it
  std::optional<double> scaling{};  ///< of q k^T; absent: 1 / sqrt(head_dim)
  Linear q_proj{}, k_proj{}, v_proj{}, o_proj{};
  /// Norms of every head of q and k, before RoPE, with one weight [head_dim] for all heads; undefined weight: none.
  /// With these norms, rotating or scaling rows of q_proj and k_proj changes the result. A transform between q and k
  /// runs online after RoPE, or goes into these weights, see absorbed(). Values and o_proj are not affected.
  RmsNorm q_norm{}, k_norm{};
  QuantPoint input{};               ///< of q_proj, k_proj, v_proj; [hidden_size]
  QuantPoint k_cache{}, v_cache{};  ///< [num_kv_heads * head_dim], one group per head; K after RoPE and its transform
  QuantPoint o_input{};             ///< of o_proj; [num_heads * head_dim]
  // Online transforms: of what `input` and `o_input` quantize, and of every head of k after RoPE, of size head_dim. q
  // takes the inverse transpose of that.
  Transform input_transform{}, o_transform{}, query_key_transform{};
  bool exact = false;  ///< in the order of docs/arithmetic.md: see DecoderLayer::prepare

  /// q before RoPE, [batch, seq, num_heads, head_dim], from the output of `input`.
  Tensor query(const LinearInput& x) const;
  /// The concatenated heads, what o_input quantizes: [batch, seq, num_heads * head_dim], from the output of `input`.
  /// @param cached see DecoderLayer::forward
  Tensor heads(const LinearInput& x, const RotaryEmbedding& rope, const CachedRows* cached = nullptr) const;
};

/// down(silu(gate(x)) * up(x)).
struct Mlp {
  Linear gate_proj{}, up_proj{}, down_proj{};
  QuantPoint input{};       ///< of gate_proj and up_proj; [hidden_size]
  QuantPoint down_input{};  ///< of down_proj; [intermediate_size]
  Tensor down_scale{};      ///< [intermediate_size] on up's output while it is learned, then merged into up_proj
  Transform input_transform{}, down_transform{};  ///< online, of what `input` and `down_input` quantize
  bool exact = false;                             ///< in the order of docs/arithmetic.md: see DecoderLayer::prepare

  /// What down_input quantizes: [batch, seq, intermediate_size], from the output of `input`.
  Tensor gated(const LinearInput& x) const;
};

/// One Llama-style decoder block. The same forward serves every architecture, full precision, learning and the
/// quantized model: what differs are the weights, the quant points, the online transforms and a few fields.
///
///     DecoderLayer layer = model.layer(0);
///     const Tensor inputs = layer.input_of(Site::kDown, hidden, model.rotary(hidden.size(1)));
///     Linear& down = layer.linear("mlp.down_proj");
///     down.weight = gptq(down.weight, second_moments(inputs), {.num_bits = 4}).weight.dequantized();
struct DecoderLayer {
  RmsNorm input_layernorm{};
  Attention self_attn{};
  RmsNorm post_attention_layernorm{};
  Mlp mlp{};
  double residual_multiplier = 1.0;  ///< of what attention and MLP add to the residual stream

  /// Block `index` of a model without its tensors and quant points.
  static DecoderLayer create(const ModelConfig& config, int64_t index);

  /// @param x      [batch, seq, hidden_size]
  /// @param rope   of the positions of x
  /// @param cached null: each of the batch starts at position 0. Else x is [1, rows, hidden_size] with the rows of all
  ///               sequences one after the other, rope has the position of every row, and keys and values go to the
  ///               sequences' caches.
  Tensor forward(const Tensor& x, const RotaryEmbedding& rope, const CachedRows* cached = nullptr) const;
  /// What the readers of kQkv, kO, kGateUp or kDown see when the block is given x.
  Tensor input_of(Site site, const Tensor& x, const RotaryEmbedding& rope) const;

  // By name, and what belongs to a site. Each throws c10::Error where there is none.
  Linear& linear(std::string_view name);
  const Linear& linear(std::string_view name) const;
  RmsNorm& norm(std::string_view name);
  QuantPoint& point(Site site);
  const QuantPoint& point(Site site) const;
  RmsNorm& norm(Site site);
  const RmsNorm& norm(Site site) const;
  Transform& transform(Site site);  ///< the online one; none at kResidual and kValue
  const Transform& transform(Site site) const;
  SiteShape shape(Site site) const;  ///< of a site with a quant point; needs the weights of its linears

  /// The same block with every tensor in another dtype or on another device; codes of quantized weights and their
  /// low-rank corrections are kept.
  DecoderLayer to(const at::TensorOptions& options) const&;
  DecoderLayer to(const at::TensorOptions& options) &&;  ///< gives each tensor back as it is converted
  /// The same block with every tensor cut from the autograd graph.
  DecoderLayer detach() const;

  /// Repacks quantized linears for integer products (docs/arithmetic.md); codes and float weights are let go of.
  /// Weights without codes and those whose inputs are quantized in groups stay floats, in the order that is defined
  /// there. The block has to be float32 on the CPU, and computes no gradients from then on.
  /// @param fixed_point_bits 8 or 15: of inputs that no point quantizes
  void prepare(int64_t fixed_point_bits);

  /// fn(name, linear) for the seven linears, Hugging Face names such as "self_attn.q_proj".
  template <class Fn>
  void for_each_linear(Fn&& fn) {
    for_each_linear_of(*this, fn);
  }
  template <class Fn>
  void for_each_linear(Fn&& fn) const {
    for_each_linear_of(*this, fn);
  }
  /// fn(name, norm) for the norms, those of q and k included, whose weights may be undefined.
  template <class Fn>
  void for_each_norm(Fn&& fn) {
    for_each_norm_of(*this, fn);
  }
  template <class Fn>
  void for_each_norm(Fn&& fn) const {
    for_each_norm_of(*this, fn);
  }
  /// fn(name, point) for the six quant points.
  template <class Fn>
  void for_each_quant_point(Fn&& fn) {
    for_each_quant_point_of(*this, fn);
  }
  template <class Fn>
  void for_each_quant_point(Fn&& fn) const {
    for_each_quant_point_of(*this, fn);
  }

 private:
  Tensor add(const Tensor& residual, const Tensor& branch) const;
  LinearInput attention_input(const Tensor& x) const;
  Tensor after_attention(const Tensor& x, const RotaryEmbedding& rope, const CachedRows* cached) const;
  LinearInput mlp_input(const Tensor& middle) const;
  template <class Layer, class Fn>
  static void for_each_linear_of(Layer& layer, Fn& fn) {
    fn("self_attn.q_proj", layer.self_attn.q_proj);
    fn("self_attn.k_proj", layer.self_attn.k_proj);
    fn("self_attn.v_proj", layer.self_attn.v_proj);
    fn("self_attn.o_proj", layer.self_attn.o_proj);
    fn("mlp.gate_proj", layer.mlp.gate_proj);
    fn("mlp.up_proj", layer.mlp.up_proj);
    fn("mlp.down_proj", layer.mlp.down_proj);
  }
  template <class Layer, class Fn>
  static void for_each_norm_of(Layer& layer, Fn& fn) {
    fn("input_layernorm", layer.input_layernorm);
    fn("post_attention_layernorm", layer.post_attention_layernorm);
    fn("self_attn.q_norm", layer.self_attn.q_norm);
    fn("self_attn.k_norm", layer.self_attn.k_norm);
  }
  template <class Layer, class Fn>
  static void for_each_quant_point_of(Layer& layer, Fn& fn) {
    for (const SiteInfo& info : sites()) {
      if (!info.point.empty()) fn(std::string(info.point), layer.point(info.site));
    }
  }
};

}  // namespace baseq
#pragma GCC visibility pop
