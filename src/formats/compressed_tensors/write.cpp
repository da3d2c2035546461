#include <ATen/ATen.h>
#include <fmt/format.h>

#include <numeric>

#include "baseq/quant/quantize.h"
#include "formats/compressed_tensors/online_transforms.h"
#include "formats/export_source.h"
#include "model/quantized_linear.h"

namespace baseq {
namespace {

using nlohmann::json;

/// The first version whose packing is a dense stream of bits for every number of bits.
constexpr const char* kVersion = "0.18.0";

/// Activations and weights of 8 bits and one scale a channel: what int8 kernels run.
bool is_int_quantized(const QuantizationConfig& quantization) {
  const QuantSpec& weights = *quantization.weights;
  return quantization.input_activations && quantization.input_activations->num_bits == 8 && weights.num_bits == 8 &&
         weights.symmetric && weights.strategy != Strategy::kGroup;
}

/// A recipe that fits, for the user to quantize with again.
std::string advice(const QuantizationConfig& quantization) {
  if (!quantization.weights) return "format hf carries it, or quantize it with the recipe w4a16-vllm";
  const auto& activations = quantization.input_activations;
  const char* recipe = !activations ? "w4a16-vllm" : activations->num_bits == 8 ? "w8a8-vllm" : "w4a4-vllm";
  const bool scales = quantization.weights->scale_dtype != at::kBFloat16;
  return fmt::format("quantize again with the recipe {}, or change the keys named{}", recipe,
                     scales ? " (grids.weights.scale_dtype to bfloat16, or export with `dtype` float32)" : "");
}

void preflight(const ExportSource& source, at::ScalarType dtype) {
  const QuantizationConfig& quantization = source.quantization();
  const auto& weights = quantization.weights;
  const auto& activations = quantization.input_activations;
  Obstacles obstacles(source, "compressed-tensors");
  obstacles.add_if(!weights, "weights in full precision");
  obstacles.add_if(quantization.kv_cache.has_value(), "a quantized cache (kv_cache)");
  obstacles.add_if(activations && !activations->symmetric,
                   "asymmetric activations, whose grid here has a real-valued zero point");
  obstacles.add_if(activations && activations->strategy != Strategy::kToken,
                   "activations with another scale than one a token");
  obstacles.add_if(activations && !source.clips_are_one(), "clip ratios of activations other than 1");
  obstacles.add_if(source.has_quant_tensor(".gain"), "gains of activations");
  obstacles.add_if(source.has_quant_tensor(".shift"), "shifts of activations");
  obstacles.add_if(!quantization.runtime.empty(), "activations that are smoothed at run time (runtime_smooth)");
  obstacles.add_if(weights && !weights->symmetric && weights->num_bits != 4 && weights->num_bits != 8,
                   weights ? fmt::format("asymmetric weights of {} bits (4 and 8 can be)", weights->num_bits) : "");
  obstacles.add_if(quantization.lora_rank > 0, "corrections of low rank (low_rank)");
  add_transform_obstacles(obstacles, source);
  obstacles.add_scale_dtype(dtype);
  obstacles.refuse(advice(quantization));
}

json weight_args(const QuantSpec& spec) {
  const bool group = spec.strategy == Strategy::kGroup;
  return {{"num_bits", spec.num_bits},
          {"type", "int"},
          {"symmetric", spec.symmetric},
          {"strategy", group ? "group" : "channel"},
          {"group_size", group ? json(spec.group_size) : json(nullptr)},
          {"dynamic", false}};
}

json activation_args(const QuantSpec& spec) {
  return {{"num_bits", spec.num_bits},
          {"type", "int"},
          {"symmetric", spec.symmetric},
          {"strategy", "token"},
          {"dynamic", true}};
}

json quantization_config(const QuantizationConfig& quantization, const char* format) {
  const auto& activations = quantization.input_activations;
  const json group{{"targets", {"Linear"}},
                   {"format", format},
                   {"weights", weight_args(*quantization.weights)},
                   {"input_activations", activations ? activation_args(*activations) : json(nullptr)},
                   {"output_activations", nullptr}};
  return {{"quant_method", "compressed-tensors"}, {"version", kVersion},   {"format", format},
          {"quantization_status", "compressed"},  {"ignore", {"lm_head"}}, {"kv_cache_scheme", nullptr},
          {"config_groups", {{"group_0", group}}}};
}

}  // namespace

ExportPlan plan_compressed_tensors(std::shared_ptr<const ExportSource> source, at::ScalarType dtype) {
  preflight(*source, dtype);
  const QuantizationConfig& quantization = source->quantization();
  const QuantSpec spec = *quantization.weights;
  const bool int_quantized = is_int_quantized(quantization);

  const auto plan_linear = [=](ExportPlan& plan, const SourceLinear& linear) {
    const int64_t rows = linear.out_features, columns = linear.in_features;
    const int64_t groups = spec.strategy == Strategy::kGroup ? columns / spec.group_size : 1;
    const std::string name = linear.full_name + ".weight";
    const auto quantized = [=]() -> const QuantizedWeight& { return *source->linear(linear).quantized; };
    const auto words = [&](int64_t codes) { return (codes * spec.num_bits + 31) / 32; };
    if (int_quantized) {
      plan.tensors.push_back({name, at::kChar, {rows, columns}, [=] { return quantized().codes; }});
    } else {
      plan.tensors.push_back({name + "_packed", at::kInt, {rows, words(columns)}, [=] {
                                return pack_to_int32(quantized().codes, spec.num_bits);
                              }});
      plan.tensors.push_back({name + "_shape", at::kLong, {2}, [=] { return at::tensor({rows, columns}, at::kLong); }});
    }
    plan.tensors.push_back(
        {name + "_scale", dtype, {rows, groups}, [=] { return quantized().qparams.scale.to(dtype); }});
    if (!spec.symmetric) {
      plan.tensors.push_back({name + "_zero_point", at::kInt, {words(rows), groups}, [=] {
                                return pack_zero_points(quantized().qparams.zero_point, spec.num_bits);
                              }});
    }
  };
  LinearFormat format{.weights = spec};
  if (int_quantized) format.codes = LinearFormat::Codes::kInt8;
  if (spec.strategy == Strategy::kTensor) format.weights->strategy = Strategy::kChannel;
  const auto check_linear = [=](const Checkpoint& written, const SourceLinear& linear) {
    expect_written(read_quantized_weight(written, linear.full_name, format).weight, source->linear(linear).weight,
                   linear.full_name + ".weight");
  };
  ExportPlan plan = plan_dense_parts(source, dtype, plan_linear, check_linear);
  plan.config["quantization_config"] =
      quantization_config(quantization, int_quantized ? "int-quantized" : "pack-quantized");
  if (!int_quantized && (spec.num_bits == 3 || (spec.num_bits > 4 && spec.num_bits < 8))) {
    plan.notes.push_back(fmt::format(
        "Codes of {} bits are packed densely: compressed-tensors 0.18 or newer reads them.", spec.num_bits));
  }
  add_transforms(plan, source, dtype);
  if (plan.readme.empty()) {
    const int64_t a_word = int_quantized ? 1 : 32 / std::gcd(int64_t{32}, spec.num_bits);
    const int64_t group = spec.strategy == Strategy::kGroup ? spec.group_size : 1;
    plan.notes.push_back(tensor_parallel_note(*source, spec.symmetric ? 1 : a_word, std::lcm(group, a_word)));
  }
  return plan;
}

}  // namespace baseq
