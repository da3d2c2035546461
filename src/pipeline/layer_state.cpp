#include "baseq/pipeline/layer_state.h"

#include <ATen/ATen.h>

namespace baseq {
namespace {

/// visit(name, tensor or bool) for all but the weights and the grids.
template <class Layer, class Visit>
void for_each_field(Layer& layer, const Visit& visit) {
  auto& attention = layer.self_attn;
  auto& mlp = layer.mlp;
  visit("input_layernorm.weight", layer.input_layernorm.weight);
  visit("post_attention_layernorm.weight", layer.post_attention_layernorm.weight);
  visit("self_attn.q_norm.weight", attention.q_norm.weight);
  visit("self_attn.k_norm.weight", attention.k_norm.weight);
  visit("mlp.down_scale", mlp.down_scale);
  layer.for_each_linear([&](const std::string& name, auto& linear) {
    visit(name + ".bias", linear.bias);
    visit(name + ".lora_A", linear.lora.A);
    visit(name + ".lora_B", linear.lora.B);
    visit(name + ".lora_A_scale", linear.lora.A_scale);
    visit(name + ".lora_B_scale", linear.lora.B_scale);
  });
  layer.for_each_quant_point([&](const std::string& name, auto& point) {
    visit(name + ".enabled", point.enabled);
    visit(name + ".add_shift_back", point.add_shift_back);
    visit(name + ".scale", point.qparams.scale);
    visit(name + ".zero_point", point.qparams.zero_point);
    visit(name + ".clip", point.clip);
    visit(name + ".gain", point.gain);
    visit(name + ".shift", point.shift);
  });
}

/// visit(name, tensor) for the tensors of a factor.
template <class FactorType, class Visit>
void for_each_part(const std::string& name, FactorType& factor, const Visit& visit) {
  visit(name + ".left", factor.left);
  visit(name + ".right", factor.right);
  visit(name + ".left_inverse", factor.left_inverse);
  visit(name + ".right_inverse", factor.right_inverse);
}

std::string factor_name(const SiteInfo& info, size_t index) {
  return std::string(info.name) + ".transform." + std::to_string(index);
}

struct Saver {
  std::map<std::string, Tensor>& state;

  void operator()(const std::string& name, const Tensor& tensor) const {
    if (tensor.defined()) state[name] = tensor.detach().cpu().contiguous();
  }
  void operator()(const std::string& name, bool flag) const { state[name] = at::scalar_tensor(flag, at::kBool); }
};

struct Restorer {
  const std::map<std::string, Tensor>& state;
  at::Device device;

  void operator()(const std::string& name, Tensor& tensor) const {
    const auto it = state.find(name);
    // A copy: where data lie in memory can decide about the last bits of a product.
    tensor = it == state.end() ? Tensor{} : it->second.clone().to(device);
  }
  void operator()(const std::string& name, bool& flag) const { flag = at(name).item<bool>(); }
  const Tensor& at(const std::string& name) const {
    const auto it = state.find(name);
    TORCH_CHECK(it != state.end(), "state of a block: ", name, " is missing");
    return it->second;
  }
};

}  // namespace

std::map<std::string, Tensor> layer_state(const DecoderLayer& layer) {
  std::map<std::string, Tensor> state;
  const Saver save{state};
  for_each_field(layer, save);
  for (const SiteInfo& info : sites()) {
    if (!info.online) continue;
    const Transform& transform = layer.transform(info.site);
    for (size_t i = 0; i < transform.size(); ++i) {
      const Factor& factor = transform[i];
      save(factor_name(info, i),
           at::tensor({static_cast<int64_t>(factor.kind), factor.block, factor.blocks}, at::kLong));
      for_each_part(factor_name(info, i), factor, save);
    }
  }
  layer.for_each_linear([&](const std::string& name, const Linear& linear) {
    if (!linear.quantized) {
      save(name + ".weight", linear.weight);
      return;
    }
    save(name + ".codes", linear.quantized->codes);
    save(name + ".weight_scale", linear.quantized->qparams.scale);
    save(name + ".weight_zero_point", linear.quantized->qparams.zero_point);
  });
  return state;
}

DecoderLayer restore_layer(DecoderLayer layer, const std::map<std::string, Tensor>& state, const Recipe& recipe,
                           const at::TensorOptions& compute) {
  const Restorer restore{state, compute.device()};
  for_each_field(layer, restore);
  for (const SiteInfo& info : sites()) {
    for (size_t i = 0; info.online && state.contains(factor_name(info, i)); ++i) {
      const Tensor& sizes = restore.at(factor_name(info, i));
      Factor factor{.kind = static_cast<Factor::Kind>(sizes[0].item<int64_t>()),
                    .block = sizes[1].item<int64_t>(),
                    .blocks = sizes[2].item<int64_t>()};
      for_each_part(factor_name(info, i), factor, restore);
      layer.transform(info.site).push_back(factor);
    }
  }
  layer.for_each_linear([&](const std::string& name, Linear& linear) {
    if (!state.contains(name + ".codes")) {
      (void)restore.at(name + ".weight");
      restore(name + ".weight", linear.weight);
      return;
    }
    TORCH_CHECK(recipe.weights, "state of a block: ", name, " is rounded, but the recipe gives no weight grid");
    linear.quantized.emplace(QuantizedWeight{.spec = *recipe.weights, .codes = {}, .qparams = {}});
    restore(name + ".codes", linear.quantized->codes);
    restore(name + ".weight_scale", linear.quantized->qparams.scale);
    restore(name + ".weight_zero_point", linear.quantized->qparams.zero_point);
    linear.weight = linear.dequantized().to(compute);
  });
  for (const SiteInfo& info : sites()) {
    if (info.point.empty() || !layer.point(info.site).enabled) continue;
    const Recipe::Activations* activations = nullptr;
    if (info.cache && recipe.kv_cache) activations = &*recipe.kv_cache;
    if (!info.cache && recipe.input_activations) activations = &*recipe.input_activations;
    TORCH_CHECK(activations, "state of a block: a point is on that the recipe does not quantize");
    layer.point(info.site).spec = activations->spec;
  }
  return layer;
}

}  // namespace baseq
