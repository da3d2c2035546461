#pragma once

#include <filesystem>
#include <memory>

#include "baseq/formats/export_plan.h"
#include "baseq/model/model.h"

/// The checkpoint as the writers of all formats see it. Not installed.
namespace baseq {

/// One of the seven linears of a block, or several whose rows the architecture stacks in one: qkv_proj, gate_up_proj.
struct SourceLinear {
  int64_t block;
  std::string name;       ///< within the block, such as "self_attn.q_proj"
  std::string full_name;  ///< with the block's prefix
  int64_t out_features, in_features;
  bool bias;
  std::vector<std::string> parts;  ///< names within the block of the linears whose rows it has
  LinearFormat format{};           ///< what its codes and its input are quantized to
  bool has_codes = true;           ///< false: scattered groups, or parts of different formats; dequantized only
};

/// A native or unquantized checkpoint whose blocks are read one at a time, the last one kept.
class ExportSource {
 public:
  explicit ExportSource(StoredModel stored);
  const Checkpoint& checkpoint() const { return model_.checkpoint(); }
  const Model& model() const { return model_; }
  const QuantizationConfig& quantization() const { return quantization_; }  ///< empty for an unquantized checkpoint
  const ModelConfig& config() const { return model_.config(); }
  const std::vector<SourceLinear>& linears() const { return linears_; }  ///< block by block
  /// The grids of the linears' weights, each once, in the order of the linears.
  std::vector<QuantSpec> grids() const;
  /// Whether a linear has no grid.
  bool leaves_linears_out() const;
  /// The tensors that are neither of a linear nor of a quant point or its transform.
  const std::vector<std::string>& others() const { return others_; }
  /// One of them, a quantized embedding or head dequantized to float32.
  Tensor other(const std::string& name) const;
  TensorInfo other_info(const std::string& name) const;
  /// Whether config.json says by `attention_bias` or `mlp_bias` that the linear has a bias; else the architecture does.
  bool has_bias_flag(const SourceLinear& linear) const;
  /// Whether an export gives the linear a bias: a flag of config.json stands for all linears of its group, and those
  /// that have none get zeros.
  bool writes_bias(const SourceLinear& linear) const;
  /// Whether a tensor of that name ending (".gain", ".self_attn.v_cache_quant.shift") is in some block.
  bool has_quant_tensor(const std::string& ending) const;
  /// Whether every clip ratio that is stored is 1.
  bool clips_are_one() const;
  /// Whether there is an online transform at a site in some block.
  bool has_online_transform(Site site) const;
  /// What tells the user which file is meant.
  std::string path() const { return checkpoint().path().string(); }

  /// As read by Model: float32, dequantized. Of a quantized one the scales are [out_features, groups]. Only one is
  /// kept: a reference holds until the next is asked for.
  const Linear& linear(const SourceLinear& which) const;
  /// float32 [out_features, in_features] for inputs that no online transform has passed: it is merged here.
  Tensor merged_weight(const SourceLinear& which) const { return merged(which, linear(which).weight); }
  /// The same of any float32 [rows, in_features] that multiplies the linear's inputs.
  Tensor merged(const SourceLinear& which, const Tensor& weight) const;

 private:
  void add_linears(int64_t block);
  /// Whether it is the quantized embedding or head.
  bool is_table(const std::string& name) const;
  bool has_bias(const std::string& full_name, const std::string& name) const;
  Model model_;
  QuantizationConfig quantization_;
  std::vector<SourceLinear> linears_;
  std::vector<std::string> others_, quant_tensors_;
  bool attention_bias_ = false, mlp_bias_ = false;  ///< some linear of the group has one
  mutable std::string read_name_;                   ///< which one `read_` is, SourceLinear::full_name
  mutable Linear read_;
};

bool is_attention(const SourceLinear& linear);
/// Whether tensor parallelism splits the linear's inputs (o_proj, down_proj) and not its outputs.
bool splits_inputs(const SourceLinear& linear);

/// Collects what a format cannot carry; the constructor's names go into the sentence.
class Obstacles {
 public:
  Obstacles(const ExportSource& source, std::string format);
  void add_if(bool found, const std::string& what) {
    if (found) found_.push_back(what);
  }
  /// What a format of weights alone has no place for: quantized activations and cache, their gains and shifts.
  void add_activations();
  /// Online transforms in front of quantized weights.
  void add_online_transforms();
  /// Scales in another dtype than `dtype`, in which the format keeps them.
  void add_scale_dtype(at::ScalarType dtype);
  /// Throws when something was found; `advice` ends the sentence.
  void refuse(const std::string& advice) const;

 private:
  const ExportSource& source_;
  std::string format_;
  std::vector<std::string> found_;
};

/// What to do where a format carries dequantized weights and nothing of the activations.
inline constexpr const char* kWeightsAlone =
    "quantize again with a recipe for weights alone, such as w4a16-vllm, or leave "
    "grids.input_activations and grids.kv_cache out of this one, and their points steps";

/// Says over how many devices tensor parallelism splits quantized weights without breaking a group or a word of packed
/// codes. `output_multiple` is the number of outputs that a device's share must be a multiple of, `input_multiple`
/// that of inputs.
std::string tensor_parallel_note(const ExportSource& source, int64_t output_multiple, int64_t input_multiple);

/// Plans the tensors that are not weights of linears (embedding, norms, head, biases) in `dtype` and the config.json
/// without quantization, and returns a plan whose check compares them. `plan_linear` adds the weights of one linear to
/// `plan.tensors`; `check_linear` throws unless `written` holds them.
ExportPlan plan_dense_parts(
    std::shared_ptr<const ExportSource> source, at::ScalarType dtype,
    const std::function<void(ExportPlan& plan, const SourceLinear& linear)>& plan_linear,
    const std::function<void(const Checkpoint& written, const SourceLinear& linear)>& check_linear);

/// What `planned.make` gives, checked against the plan.
Tensor made(const PlannedTensor& planned);

/// Throws naming `name` unless the two are the same tensor, bit for bit.
void expect_written(const Tensor& written, const Tensor& source, const std::string& name);

/// As config.json spells it.
const char* torch_dtype_name(at::ScalarType dtype);

ExportPlan plan_hugging_face(std::shared_ptr<const ExportSource> source, at::ScalarType dtype);
ExportPlan plan_compressed_tensors(std::shared_ptr<const ExportSource> source, at::ScalarType dtype);
ExportPlan plan_gptq(std::shared_ptr<const ExportSource> source, at::ScalarType dtype);
ExportPlan plan_awq(std::shared_ptr<const ExportSource> source, at::ScalarType dtype);
ExportPlan plan_peft(std::shared_ptr<const ExportSource> source, at::ScalarType dtype);
ExportPlan plan_gguf(std::shared_ptr<const ExportSource> source, const std::string& type,
                     const std::optional<std::string>& head_type);

/// What a format that is one file adds to a plan, whose PlannedTensors are then the bytes of its tensors.
struct ExportFile {
  std::vector<ExportedTensor> tensors;  ///< what those bytes stand for, in the same order
  int64_t num_header_bytes = 0;
  /// Throws unless a file of `num_bytes` can be written and nothing is lost by it.
  std::function<void(const std::filesystem::path& output, bool force, int64_t num_bytes)> check_output;
  /// Writes, checks and names the file.
  std::function<void(const ExportPlan& plan, const std::filesystem::path& output, bool force,
                     const std::function<void(int64_t done, int64_t total)>& progress)>
      write;
};

}  // namespace baseq
