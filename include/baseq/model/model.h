#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "baseq/model/decoder_layer.h"
#include "baseq/model/stored_model.h"

#pragma GCC visibility push(default)
namespace baseq {

class NamedTensors;

/// One of the seven linears of a block.
struct LinearShape {
  const char* name = "";  ///< "self_attn.q_proj"
  int64_t out_features = 0, in_features = 0;
  bool bias = false;
};
/// In the order of DecoderLayer::for_each_linear.
std::vector<LinearShape> linear_shapes(const ModelConfig& config);

/// That of one of them; throws c10::Error for another name.
LinearShape linear_shape(const ModelConfig& config, std::string_view name);

/// One of the norms of a block.
struct NormShape {
  const char* name = "";  ///< "input_layernorm"
  int64_t features = 0;
};
/// The norms that the blocks of a model have.
std::vector<NormShape> norm_shapes(const ModelConfig& config);

/// fn(name, shape) for every tensor of a model in full precision, under LlamaForCausalLM's names.
void for_each_tensor(const ModelConfig& config,
                     const std::function<void(const std::string& name, at::IntArrayRef shape)>& fn);

class Decoder;

enum class Arithmetic {
  kInteger,  ///< quantized linears multiply integers, in an order defined to the bit: docs/arithmetic.md
  kFloat,    ///< float products of dequantized weights with inputs rounded to their grids
};

/// How a quantized checkpoint is run. One in full precision computes in floats.
struct LoadOptions {
  Arithmetic arithmetic = Arithmetic::kInteger;
  int64_t activation_bits = 15;  ///< 8 or 15: of the inputs of quantized linears that the checkpoint does not quantize

  bool operator==(const LoadOptions&) const = default;
};

/// Reads a Llama-style model from a checkpoint of any tool piece by piece: whoever walks through the blocks holds one
/// of them at a time. It owns what it reads:
///   const Model model(open_model("SmolLM2-135M-Instruct"));
///   const Tensor logits = model.logits(at::tensor({1, 2, 3}).view({1, 3}));
class Model {
 public:
  static constexpr LoadOptions kFloats{.arithmetic = Arithmetic::kFloat};

  struct Options {
    at::ScalarType dtype = at::kFloat;  ///< compute dtype of everything returned
    at::Device device = at::kCPU;
  };

  /// Throws c10::Error listing every tensor that the checkpoint lacks. Tensors that the architecture does not have,
  /// such as buffers of old versions of transformers, are not looked at: see find_unused.
  Model(StoredModel stored, const Options& options);
  explicit Model(StoredModel stored) : Model(std::move(stored), Options{}) {}

  const StoredModel& stored() const { return stored_; }
  const ModelConfig& config() const { return stored_.config; }
  /// Absent for a checkpoint in full precision.
  const std::optional<QuantizationConfig>& quantization() const { return stored_.quantization; }
  const Options& options() const { return options_; }

  const Checkpoint& checkpoint() const { return stored_.tensors; }
  /// The tensors as the checkpoint stores them, under LlamaForCausalLM's names.
  const NamedTensors& tensors() const { return *tensors_; }
  /// The names in the checkpoint of tensors that the model never reads, sorted.
  std::vector<std::string> unused_names() const;

  Tensor embedding() const;  ///< [vocab_size, hidden_size]
  /// [batch, seq] integers -> [batch, seq, hidden_size], times embedding_multiplier.
  Tensor embed(const Tensor& input_ids) const;
  DecoderLayer layer(int64_t index) const;  ///< leaves nothing of the mapped file in memory
  /// The same, prepared if runs_integers(options).
  DecoderLayer layer(int64_t index, const LoadOptions& options) const;
  /// Whether `options` ask for integers and the model can compute with them: it is quantized, and read in float32 on
  /// the CPU.
  bool runs_integers(const LoadOptions& options) const;
  /// All blocks and the head, to stay in memory.
  Decoder load(const LoadOptions& options = {}) const;
  /// The same with every tensor in the dtype it is stored in, at least float32; only for a model in full precision.
  DecoderLayer stored_layer(int64_t index) const;
  /// One of `layer(index)`, by its name there ("self_attn.q_proj"), without reading the others.
  Linear linear(int64_t index, const std::string& name) const;
  /// The kinds of the factors of a block's online transform; empty: it has none. Known without reading a tensor.
  std::vector<Factor::Kind> online_kinds(int64_t block, Site site) const;
  /// That of layer(block).transform(site), without reading the weights. A checkpoint stores inverses at kQueryKey
  /// alone: at other sites the factors are for apply_transform and apply_transpose.
  Transform online_transform(int64_t block, Site site) const;
  RmsNorm final_norm(const LoadOptions& options = kFloats) const;
  /// The embedding when tied; over logits_scaling.
  Linear lm_head(const LoadOptions& options = kFloats) const;
  RotaryEmbedding rotary(int64_t seq_len) const;
  /// [batch, seq] integers -> [batch, seq, vocab_size]; one block at a time.
  Tensor logits(const Tensor& input_ids) const;

 private:
  using OptionalType = std::optional<at::ScalarType>;  ///< absent: as stored, at least float32
  enum class Weights { kFloat, kCodes };               ///< kCodes: `weight` stays undefined where there are codes
  Tensor read(const std::string& name, OptionalType dtype) const;
  Tensor read(const std::string& name) const { return read(name, options_.dtype); }
  Tensor embedding_rows(const Tensor& ids) const;
  Linear read_linear(const std::string& name, bool with_bias, OptionalType dtype, Weights weights) const;
  Linear read_linear(int64_t index, const std::string& name, OptionalType dtype, Weights weights) const;
  DecoderLayer read_layer(int64_t index, OptionalType dtype, Weights weights = Weights::kFloat) const;
  /// The format of a linear; that of full precision for one that is not quantized.
  const LinearFormat& format(const std::string& name) const;
  void read_quant_point(const std::string& name, QuantPoint& point) const;
  void read_input_points(const std::string& prefix, DecoderLayer& layer) const;
  /// fn(name, required) for every tensor that the model reads where it is there.
  void for_each_name(const std::function<void(const std::string& name, bool required)>& fn) const;
  void check_tensors() const;

  StoredModel stored_;
  Options options_;
  std::shared_ptr<const NamedTensors> tensors_;
};

/// "model.layers.<index>."
std::string layer_prefix(int64_t index);

}  // namespace baseq
#pragma GCC visibility pop
