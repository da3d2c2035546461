#include <ATen/ATen.h>
#include <fmt/format.h>

#include <numeric>

#include "formats/export_source.h"
#include "formats/gptq/layout.h"

namespace baseq {
namespace {

using nlohmann::json;

/// The least count of numbers that fills words.
int64_t words_multiple(int64_t num_bits) { return 32 / std::gcd(int64_t{32}, num_bits); }

const char* format_name(const PackedLayout& layout) { return layout.awq ? "awq" : "gptq"; }

std::string advice(const PackedLayout& layout, const char* recipe) {
  return fmt::format(
      "quantize again with the recipe {}, or change the keys named; format hf carries dequantized weights{}", recipe,
      layout.awq ? ", gptq 2, 3, 4 and 8 bits" : "");
}

void preflight(const ExportSource& source, const PackedLayout& layout, const char* recipe) {
  const auto& weights = source.quantization().weights;
  const bool awq = layout.awq;
  Obstacles obstacles(source, format_name(layout));
  obstacles.add_if(!weights, "weights in full precision");
  obstacles.add_if(source.grids().size() > 1 || (weights && source.leaves_linears_out()),
                   "linears with other grids than the rest, or without one (grids.overrides)");
  obstacles.add_if(source.quantization().lora_rank > 0, "corrections of low rank (low_rank)");
  obstacles.add_activations();
  obstacles.add_online_transforms();
  if (weights) {
    const int64_t bits = weights->num_bits, multiple = words_multiple(bits);
    const bool has_bits = awq ? bits == 4 : bits <= 4 || bits == 8;
    obstacles.add_if(!has_bits, fmt::format("weights of {} bits", bits));
    for (const SourceLinear& linear : source.linears()) {
      if (linear.block > 0 || !has_bits) break;
      const bool inputs = !awq && linear.in_features % multiple != 0;
      obstacles.add_if(
          inputs || linear.out_features % multiple != 0,
          fmt::format("{}'s {} {}, no multiple of {}", linear.name, inputs ? linear.in_features : linear.out_features,
                      inputs ? "inputs" : "outputs", multiple));
    }
    obstacles.add_scale_dtype(at::kHalf);
  }
  obstacles.refuse(advice(layout, recipe));
}

/// float32 [out_features, in_features], as loaders of the format compute it.
Tensor dequantize_written(const Checkpoint& written, const SourceLinear& linear, const PackedLayout& layout) {
  const auto tensor = [&](const char* part) { return written.tensor(linear.full_name + part); };
  const Tensor scale = tensor(kScales).t().to(at::kFloat).unsqueeze(-1);
  const Tensor zero_point = layout.unpack_zero_points(tensor(kQzeros)).unsqueeze(-1);
  const Tensor codes = layout.unpack_codes(tensor(kQweight)).to(at::kFloat);
  return ((codes.view({linear.out_features, scale.size(1), -1}) - zero_point) * scale).view(codes.sizes());
}

/// The group of every input, int32 [in_features].
Tensor group_indices(int64_t in_features, int64_t groups) {
  return at::div(at::arange(in_features, at::kInt), in_features / groups, "floor");
}

ExportPlan plan_layout(std::shared_ptr<const ExportSource> source, at::ScalarType dtype, const PackedLayout& layout) {
  const QuantSpec spec = *source->quantization().weights;
  const bool grouped = spec.strategy == Strategy::kGroup;
  const auto plan_linear = [=](ExportPlan& plan, const SourceLinear& linear) {
    const int64_t rows = linear.out_features, columns = linear.in_features;
    const int64_t groups = grouped ? columns / spec.group_size : 1;
    const auto quantized = [=]() -> const QuantizedWeight& { return *source->linear(linear).quantized; };
    const auto words = [&](int64_t count) { return count * spec.num_bits / 32; };
    plan.tensors.push_back({linear.full_name + kQweight, at::kInt, layout.qweight_shape(rows, columns),
                            [=] { return layout.pack_codes(quantized().codes); }});
    plan.tensors.push_back(
        {linear.full_name + kQzeros, at::kInt, {groups, words(rows)}, [=] {
           const Tensor& zero_point = quantized().qparams.zero_point;
           return layout.pack_zero_points(zero_point.defined() ? zero_point : at::zeros({rows, groups}));
         }});
    plan.tensors.push_back({linear.full_name + kScales, at::kHalf, {groups, rows}, [=] {
                              return quantized().qparams.scale.t().to(at::kHalf).contiguous();
                            }});
    if (!layout.awq) {
      plan.tensors.push_back(
          {linear.full_name + kGroupIndex, at::kInt, {columns}, [=] { return group_indices(columns, groups); }});
    }
  };
  const auto check_linear = [=](const Checkpoint& written, const SourceLinear& linear) {
    expect_written(dequantize_written(written, linear, layout), source->linear(linear).weight,
                   linear.full_name + kQweight);
    if (layout.awq) return;
    const std::string name = linear.full_name + kGroupIndex;
    const int64_t groups = written.tensor(linear.full_name + kScales).size(0);
    expect_written(written.tensor(name), group_indices(linear.in_features, groups), name);
  };
  ExportPlan plan = plan_dense_parts(source, dtype, plan_linear, check_linear);
  const int64_t multiple = words_multiple(spec.num_bits);
  plan.notes.push_back(
      tensor_parallel_note(*source, multiple, std::lcm(!layout.awq ? multiple : 1, grouped ? spec.group_size : 1)));
  if (grouped && spec.group_size != 32 && spec.group_size != 64 && spec.group_size != 128) {
    plan.notes.push_back(
        fmt::format("Kernels of this format are made for groups of 32, 64 and 128, or one scale a "
                    "channel; these are groups of {}.",
                    spec.group_size));
  }
  return plan;
}

json group_size(const QuantSpec& spec) { return spec.strategy == Strategy::kGroup ? spec.group_size : -1; }

}  // namespace

ExportPlan plan_gptq(std::shared_ptr<const ExportSource> source, at::ScalarType dtype) {
  const QuantSpec spec = source->quantization().weights.value_or(QuantSpec{});
  // Readers of version 1 add one to what is stored, which the lowest zero point of an asymmetric grid does not survive.
  const int64_t version = spec.symmetric ? 1 : 2;
  const PackedLayout layout{.num_bits = spec.num_bits, .version = version};
  preflight(*source, layout, "w4-gptq");
  ExportPlan plan = plan_layout(source, dtype, layout);
  const json config{{"quant_method", "gptq"},
                    {"bits", spec.num_bits},
                    {"group_size", group_size(spec)},
                    {"desc_act", false},
                    {"sym", spec.symmetric},
                    {"lm_head", false},
                    {"checkpoint_format", version == 1 ? "gptq" : "gptq_v2"},
                    {"pack_dtype", "int32"}};
  plan.config["quantization_config"] = config;
  plan.files["quantize_config.json"] = config.dump(2) + "\n";
  if (!spec.symmetric) {
    plan.notes.push_back(
        "Zero points are stored as they are (checkpoint_format gptq_v2): GPTQModel and newer versions of vLLM read "
        "them, "
        "programs that know only the first version are off by one step.");
  }
  return plan;
}

ExportPlan plan_awq(std::shared_ptr<const ExportSource> source, at::ScalarType dtype) {
  const PackedLayout layout{.awq = true};
  preflight(*source, layout, "w4-awq");
  ExportPlan plan = plan_layout(source, dtype, layout);
  const QuantSpec spec = *source->quantization().weights;
  plan.config["quantization_config"] = {
      {"quant_method", "awq"}, {"bits", spec.num_bits}, {"group_size", group_size(spec)},
      {"zero_point", true},    {"version", "gemm"},     {"modules_to_not_convert", nullptr}};
  plan.files["quantize_config.json"] =
      json{{"w_bit", spec.num_bits}, {"q_group_size", group_size(spec)}, {"zero_point", true}, {"version", "GEMM"}}
          .dump(2) +
      "\n";
  return plan;
}

}  // namespace baseq
