#include "export_source.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <set>

#include "baseq/model/modeling_source.h"
#include "baseq/transform/hadamard.h"

namespace baseq {
namespace {

bool is_attention(const SourceLinear& linear) { return linear.name.starts_with("self_attn."); }

/// config.json says "dtype" since transformers 4.56 and "torch_dtype" before; both are read.
void set_dtype(nlohmann::json& config, at::ScalarType dtype) {
  const char* name = dtype == at::kBFloat16 ? "bfloat16" : dtype == at::kHalf ? "float16" : "float32";
  config[config.contains("dtype") ? "dtype" : "torch_dtype"] = name;
  if (config.contains("torch_dtype")) config["torch_dtype"] = name;
}

}  // namespace

ExportSource::ExportSource(const Checkpoint& checkpoint) : checkpoint_(checkpoint), model_(checkpoint) {
  if (model_.quantization()) quantization_ = *model_.quantization();
  TORCH_CHECK(!config().fused_projections && checkpoint.contains("model.embed_tokens.weight"), path(), ": ",
              config().architecture,
              " with fused projections, or names without \"model.\" in front, cannot be exported; export reads "
              "LlamaForCausalLM's names");
  std::set<std::string> of_linears;
  std::vector<std::string> names, points;
  DecoderLayer{}.for_each_linear([&](const std::string& name, const Linear&) { names.push_back(name); });
  DecoderLayer{}.for_each_quant_point([&](const std::string& name, const QuantPoint&) { points.push_back(name); });
  for (int64_t block = 0; block < model_.config().num_hidden_layers; ++block) {
    const std::string prefix = layer_prefix(block);
    for (const std::string& name : names) {
      const std::string full = prefix + name;
      for (const char* part : {".weight", ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape",
                               ".lora_A", ".lora_B", ".bias"}) {
        of_linears.insert(full + part);
      }
      std::vector<int64_t> shape;
      if (quantization_.weights) {
        const Tensor stored = checkpoint.tensor(full + ".weight_shape").to(at::kLong);
        shape.assign(stored.const_data_ptr<int64_t>(), stored.const_data_ptr<int64_t>() + stored.numel());
      } else {
        shape = checkpoint.tensor(full + ".weight").sizes().vec();
      }
      TORCH_CHECK(shape.size() == 2, full, ": the weight has ", shape.size(), " dimensions, expected 2");
      linears_.push_back({block, name, full, shape[0], shape[1], has_bias(full, name)});
    }
    for (const std::string& point : points) {
      for (const char* part : {".clip", ".gain", ".shift"}) {
        if (checkpoint.contains(prefix + point + part)) quant_tensors_.push_back(prefix + point + part);
      }
    }
  }
  const std::set<std::string> of_points(quant_tensors_.begin(), quant_tensors_.end());
  for (const std::string& name : checkpoint.names()) {
    if (!of_linears.contains(name) && !of_points.contains(name)) others_.push_back(name);
  }
}

bool ExportSource::has_bias(const std::string& full_name, const std::string& name) const {
  const ModelConfig& model = config();
  const bool promised = name == "self_attn.o_proj"       ? model.o_bias
                        : name.starts_with("self_attn.") ? model.attention_bias
                                                         : model.mlp_bias;
  // Corrections put biases where the original has none.
  const bool bias = promised || (model_.quantization() && checkpoint_.contains(full_name + ".bias"));
  TORCH_CHECK(bias == promised || has_bias_flags(), path(), ": ", full_name, " has a bias, which ", model.architecture,
              " has no place for");
  return bias;
}

bool ExportSource::has_bias_flags() const {
  const std::string& name = config().architecture;
  return name != "MistralForCausalLM" && name != "Qwen2ForCausalLM";
}

bool ExportSource::has_quant_tensor(const std::string& ending) const {
  return std::any_of(quant_tensors_.begin(), quant_tensors_.end(),
                     [&](const std::string& name) { return name.ends_with(ending); });
}

bool ExportSource::clips_are_one() const {
  return std::all_of(quant_tensors_.begin(), quant_tensors_.end(), [&](const std::string& name) {
    return !name.ends_with(".clip") || checkpoint_.tensor(name).eq(1).all().item<bool>();
  });
}

const Linear& ExportSource::linear(const SourceLinear& which) const {
  if (block_ != which.block) {
    layer_.clear();
    model_.layer(which.block).for_each_linear([&](const std::string& name, const Linear& linear) {
      layer_[name] = linear;
    });
    block_ = which.block;
  }
  return layer_.at(which.name);
}

Tensor ExportSource::merged_weight(const SourceLinear& which) const {
  const Tensor& weight = linear(which).weight;
  const bool behind_norm = which.name != "self_attn.o_proj" && which.name != "mlp.down_proj";
  const bool rotated = behind_norm                        ? quantization_.input_hadamard
                       : which.name == "self_attn.o_proj" ? quantization_.o_hadamard
                                                          : quantization_.down_hadamard;
  // (x H) W^T = x (W H^T)^T
  return rotated ? hadamard_transform(weight.to(at::kDouble), /*transpose=*/true).to(at::kFloat) : weight;
}

void Obstacles::refuse(const std::string& advice) const {
  TORCH_CHECK(found_.empty(), source_.path(), ": format ", format_, " cannot carry ",
              fmt::format("{}", fmt::join(found_, ", ")), "; ", advice);
}

void expect_written(const Tensor& written, const Tensor& source, const std::string& name) {
  TORCH_CHECK(written.scalar_type() == source.scalar_type() && at::equal(written, source), "export: ", name,
              " read back from the output differs from the source");
}

ExportPlan plan_dense_parts(std::shared_ptr<const ExportSource> source, at::ScalarType dtype,
                            const std::function<void(ExportPlan&, const SourceLinear&)>& plan_linear,
                            const std::function<void(const Checkpoint&, const SourceLinear&)>& check_linear) {
  ExportPlan plan;
  const Checkpoint& checkpoint = source->checkpoint();
  const auto other = [&checkpoint, dtype](const std::string& name) {
    const Tensor tensor = checkpoint.tensor(name);
    return tensor.is_floating_point() ? tensor.to(dtype) : tensor;
  };
  for (const std::string& name : source->others()) {
    const Tensor stored = checkpoint.tensor(name);
    plan.tensors.push_back({name, stored.is_floating_point() ? dtype : stored.scalar_type(), stored.sizes().vec(),
                            [other, name, source] { return other(name); }});
  }

  // A flag of config.json stands for the biases of all linears of its group: those that have none get zeros.
  bool attention_bias = false, mlp_bias = false;
  for (const SourceLinear& linear : source->linears()) {
    (is_attention(linear) ? attention_bias : mlp_bias) |= linear.bias;
  }
  const auto bias = [source, dtype](const SourceLinear& linear) {
    if (!linear.bias) return at::zeros({linear.out_features}, dtype);
    return source->checkpoint().tensor(linear.full_name + ".bias").to(dtype);
  };
  const bool flags = source->has_bias_flags();
  const auto has_bias = [=](const SourceLinear& linear) {
    return flags ? (is_attention(linear) ? attention_bias : mlp_bias) : linear.bias;
  };
  for (const SourceLinear& linear : source->linears()) {
    plan_linear(plan, linear);
    if (has_bias(linear)) {
      plan.tensors.push_back(
          {linear.full_name + ".bias", dtype, {linear.out_features}, [bias, linear] { return bias(linear); }});
    }
  }

  plan.config = checkpoint.config();
  plan.config.erase("quantization_config");
  if (const auto map = plan.config.find("auto_map"); map != plan.config.end() && map->is_object()) {
    if (map->value("AutoModelForCausalLM", "") == kModelingClass) map->erase("AutoModelForCausalLM");
    if (map->empty()) plan.config.erase("auto_map");
  }
  if (flags) {
    plan.config["attention_bias"] = attention_bias;
    plan.config["mlp_bias"] = mlp_bias;
  }
  set_dtype(plan.config, dtype);
  if (source->quantization().query_key_hadamard) {
    plan.notes.push_back(
        "The online Hadamard transform of queries and keys is left out: without a quantized cache the "
        "two sides cancel.");
  }
  plan.check_weights = [=](const Checkpoint& written) {
    for (const std::string& name : source->others()) expect_written(written.tensor(name), other(name), name);
    for (const SourceLinear& linear : source->linears()) {
      check_linear(written, linear);
      const std::string name = linear.full_name + ".bias";
      if (has_bias(linear)) expect_written(written.tensor(name), bias(linear), name);
    }
  };
  return plan;
}

}  // namespace baseq
