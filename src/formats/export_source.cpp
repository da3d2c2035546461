#include "formats/export_source.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "model/named_tensors.h"
#include "model/quantized_linear.h"

namespace baseq {
namespace {

constexpr const char* kParts[] = {".weight",       ".weight_packed", ".weight_scale", ".weight_zero_point",
                                  ".weight_shape", ".weight_g_idx",  ".input_scale",  ".input_zero_point",
                                  ".lora_A",       ".lora_B",        ".lora_A_scale", ".lora_B_scale",
                                  ".bias"};

/// One row a channel: `[1, 1]` with strategy "tensor" stands for all of them.
Tensor by_channel(const Tensor& qparam, int64_t out_features) {
  if (!qparam.defined() || qparam.size(0) == out_features) return qparam;
  return qparam.expand({out_features, qparam.size(1)}).contiguous();
}

/// The rows of all of them in one linear.
Linear stacked(const std::vector<Linear>& linears) {
  const auto rows = [&](auto&& part) {
    std::vector<Tensor> tensors;
    for (const Linear& linear : linears) tensors.push_back(part(linear));
    return tensors[0].defined() ? at::cat(tensors) : Tensor();
  };
  Linear result;
  result.weight = rows([](const Linear& linear) { return linear.weight; });
  const bool alike = std::ranges::all_of(linears, [&](const Linear& linear) {
    return linear.quantized && linears[0].quantized && linear.quantized->spec == linears[0].quantized->spec;
  });
  if (alike) {
    QuantizedWeight quantized{.spec = linears[0].quantized->spec};
    quantized.codes = rows([](const Linear& linear) { return linear.quantized->codes; });
    quantized.qparams.scale = rows([](const Linear& linear) { return linear.quantized->qparams.scale; });
    quantized.qparams.zero_point = rows([](const Linear& linear) { return linear.quantized->qparams.zero_point; });
    result.quantized = std::move(quantized);
  }
  return result;
}

}  // namespace

bool is_attention(const SourceLinear& linear) { return site_info(input_site(linear.name)).attention; }

bool splits_inputs(const SourceLinear& linear) {
  const auto writers = site_info(Site::kResidual).writers;
  return std::find(writers.begin(), writers.end(), linear.name) != writers.end();
}

ExportSource::ExportSource(StoredModel stored) : model_(std::move(stored)) {
  const Checkpoint& checkpoint = this->checkpoint();
  if (model_.quantization()) quantization_ = *model_.quantization();
  TORCH_CHECK(
      checkpoint.contains("model.embed_tokens.weight") || is_table("model.embed_tokens.weight"), path(),
      ": the names of the tensors have no \"model.\" in front, as a model without a head is saved; export reads ",
      config().architecture, "'s names");
  std::set<std::string> of_blocks;
  for (int64_t block = 0; block < config().num_hidden_layers; ++block) {
    const std::string prefix = layer_prefix(block);
    const size_t first = linears_.size();
    add_linears(block);
    for (size_t i = first; i < linears_.size(); ++i) {
      for (const char* part : kParts) {
        of_blocks.insert(linears_[i].full_name + part);
        for (const std::string& name : linears_[i].parts) of_blocks.insert(prefix + name + part);
      }
    }
    for (const SiteInfo& info : sites()) {
      const std::string point = prefix + std::string(info.point);
      for (const char* part : {".clip", ".gain", ".shift"}) {
        if (checkpoint.contains(point + part)) quant_tensors_.push_back(point + part);
      }
      const auto& online = model_.stored().online;
      if (const auto it = online.find({block, info.site}); it != online.end()) {
        of_blocks.insert(it->second.names.begin(), it->second.names.end());
      }
    }
  }
  for (const SourceLinear& linear : linears_) (is_attention(linear) ? attention_bias_ : mlp_bias_) |= linear.bias;
  of_blocks.insert(quant_tensors_.begin(), quant_tensors_.end());
  for (const std::string& name : checkpoint.names()) {
    if (of_blocks.contains(name)) continue;
    const size_t end = name.rfind(".weight_");
    std::string whole = end == name.npos ? name : name.substr(0, end) + ".weight";
    if (!is_table(whole)) {
      others_.push_back(name);
    } else if (name == whole || name.ends_with(".weight_packed")) {
      others_.push_back(std::move(whole));
    }
  }
}

std::vector<QuantSpec> ExportSource::grids() const {
  std::vector<QuantSpec> found;
  for (const SourceLinear& linear : linears_) {
    const auto& grid = linear.format.weights;
    if (grid && std::ranges::find(found, *grid) == found.end()) found.push_back(*grid);
  }
  return found;
}

bool ExportSource::leaves_linears_out() const {
  return std::ranges::any_of(linears_, [](const SourceLinear& linear) { return !linear.format.weights; });
}

bool ExportSource::is_table(const std::string& name) const {
  return name.ends_with(".weight") && model_.stored().linears.contains(name.substr(0, name.rfind('.')));
}

Tensor ExportSource::other(const std::string& name) const {
  if (!is_table(name)) return checkpoint().tensor(name);
  const std::string table = name.substr(0, name.rfind('.'));
  return read_quantized_weight(checkpoint(), table, model_.stored().linears.at(table)).weight;
}

TensorInfo ExportSource::other_info(const std::string& name) const {
  if (!is_table(name)) return checkpoint().info(name);
  return {at::kFloat, {config().vocab_size, config().hidden_size}};
}

void ExportSource::add_linears(int64_t block) {
  const std::string prefix = layer_prefix(block);
  DecoderLayer{}.for_each_linear([&](const std::string& part, const Linear&) {
    std::vector<int64_t> shape;
    if (checkpoint().contains(prefix + part + ".weight_scale") &&
        !checkpoint().contains(prefix + part + ".weight_shape")) {
      shape = checkpoint().info(prefix + part + ".weight").shape;  // codes of a byte each
    } else if (checkpoint().contains(prefix + part + ".weight_shape")) {
      const Tensor stored = checkpoint().tensor(prefix + part + ".weight_shape").to(at::kLong);
      shape.assign(stored.const_data_ptr<int64_t>(), stored.const_data_ptr<int64_t>() + stored.numel());
    } else {
      shape = model_.tensors().info(prefix + part + ".weight").shape;
    }
    TORCH_CHECK(shape.size() == 2, prefix, part, ": the weight has ", shape.size(), " dimensions, expected 2");
    const bool bias = has_bias(prefix + part, part);
    const auto stored = model_.stored().linears.find(prefix + part);
    const LinearFormat format = stored == model_.stored().linears.end() ? LinearFormat{} : stored->second;
    const std::string_view fused = site_info(input_site(part)).fused;
    const std::string name(config().fused_projections && !fused.empty() ? fused : part);
    if (!linears_.empty() && linears_.back().full_name == prefix + name) {
      linears_.back().out_features += shape[0];
      linears_.back().bias |= bias;
      linears_.back().parts.push_back(part);
      linears_.back().has_codes &= format == linears_.back().format;
    } else {
      linears_.push_back({block, name, prefix + name, shape[0], shape[1], bias, {part}, format, !format.group_index});
    }
  });
}

bool ExportSource::has_bias(const std::string& full_name, const std::string& name) const {
  // Corrections put biases where the original has none.
  return linear_shape(config(), name).bias || (model_.quantization() && checkpoint().contains(full_name + ".bias"));
}

bool ExportSource::has_bias_flag(const SourceLinear& linear) const {
  const std::string& name = config().architecture;
  if (name == "Qwen3ForCausalLM") return is_attention(linear);
  return name == "LlamaForCausalLM" || name == "SmolLM3ForCausalLM" || name == "GraniteForCausalLM";
}

bool ExportSource::writes_bias(const SourceLinear& linear) const {
  return has_bias_flag(linear) ? (is_attention(linear) ? attention_bias_ : mlp_bias_) : linear.bias;
}

bool ExportSource::has_quant_tensor(const std::string& ending) const {
  return std::any_of(quant_tensors_.begin(), quant_tensors_.end(),
                     [&](const std::string& name) { return name.ends_with(ending); });
}

bool ExportSource::clips_are_one() const {
  return std::all_of(quant_tensors_.begin(), quant_tensors_.end(), [&](const std::string& name) {
    return !name.ends_with(".clip") || checkpoint().tensor(name).eq(1).all().item<bool>();
  });
}

bool ExportSource::has_online_transform(Site site) const {
  for (int64_t block = 0; block < config().num_hidden_layers; ++block) {
    if (!model_.online_kinds(block, site).empty()) return true;
  }
  return false;
}

const Linear& ExportSource::linear(const SourceLinear& which) const {
  if (read_name_ == which.full_name) return read_;
  read_name_.clear();
  read_ = {};
  std::vector<Linear> parts;
  for (const std::string& part : which.parts) {
    Linear& read = parts.emplace_back(model_.linear(which.block, part));
    if (!read.quantized) continue;
    QParams& qparams = read.quantized->qparams;
    qparams.scale = by_channel(qparams.scale, read.weight.size(0));
    qparams.zero_point = by_channel(qparams.zero_point, read.weight.size(0));
  }
  read_ = parts.size() == 1 ? std::move(parts[0]) : stacked(parts);
  read_name_ = which.full_name;
  checkpoint().release_pages();
  return read_;
}

Tensor ExportSource::merged(const SourceLinear& which, const Tensor& weight) const {
  const Transform transform = model_.online_transform(which.block, input_site(which.name));
  return transform.empty() ? weight : apply_transpose(transform, weight.to(at::kDouble)).to(at::kFloat);
}

}  // namespace baseq
