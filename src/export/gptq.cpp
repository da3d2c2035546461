#include <ATen/ATen.h>
#include <fmt/format.h>

#include <numeric>

#include "baseq/quant/gptq_layout.h"
#include "export_source.h"

namespace baseq {
namespace {

using nlohmann::json;

/// GPTQ and AWQ checkpoints hold the same three tensors, inputs first, in different words.
struct Layout {
  std::string format;                                             ///< name of the export format
  bool g_idx;                                                     ///< the group of every input is written out
  std::function<Tensor(const Tensor&)> pack_codes, unpack_codes;  ///< [out, in] <-> qweight
  std::function<Tensor(const Tensor&)> pack_zero_points, unpack_zero_points;  ///< [out, groups] <-> qzeros
};

Layout gptq_layout(int64_t num_bits, GptqVersion version) {
  return {"gptq",
          true,
          [=](const Tensor& codes) { return pack_gptq_codes(codes, num_bits); },
          [=](const Tensor& words) { return unpack_gptq_codes(words, num_bits); },
          [=](const Tensor& zero_point) { return pack_gptq_zero_points(zero_point, num_bits, version); },
          [=](const Tensor& words) { return unpack_gptq_zero_points(words, num_bits, version); }};
}

Layout awq_layout() {
  return {"awq", false, pack_awq_codes, unpack_awq_codes, pack_awq_zero_points, unpack_awq_zero_points};
}

/// The least count of numbers that fills words.
int64_t words_multiple(int64_t num_bits) { return 32 / std::gcd(int64_t{32}, num_bits); }

std::string advice(const char* format, const char* recipe) {
  return fmt::format(
      "quantize again with configs/{}.json, or change the keys named; format hf carries dequantized weights{}", recipe,
      format == std::string("awq") ? ", gptq 2, 3, 4 and 8 bits" : "");
}

void preflight(const ExportSource& source, const Layout& layout, const char* recipe) {
  const auto& weights = source.quantization().weights;
  const bool awq = layout.format == "awq";
  Obstacles obstacles(source, layout.format);
  obstacles.add_if(!weights, "weights in full precision");
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
  obstacles.refuse(advice(layout.format.c_str(), recipe));
}

/// float32 [out_features, in_features], as loaders of the format compute it.
Tensor dequantize_written(const Checkpoint& written, const SourceLinear& linear, const Layout& layout) {
  const auto tensor = [&](const char* part) { return written.tensor(linear.full_name + part); };
  const Tensor scale = tensor(".scales").t().to(at::kFloat).unsqueeze(-1);
  const Tensor zero_point = layout.unpack_zero_points(tensor(".qzeros")).unsqueeze(-1);
  const Tensor codes = layout.unpack_codes(tensor(".qweight")).to(at::kFloat);
  return ((codes.view({linear.out_features, scale.size(1), -1}) - zero_point) * scale).view(codes.sizes());
}

/// The group of every input, int32 [in_features].
Tensor group_indices(int64_t in_features, int64_t groups) {
  return at::div(at::arange(in_features, at::kInt), in_features / groups, "floor");
}

ExportPlan plan_layout(std::shared_ptr<const ExportSource> source, at::ScalarType dtype, const Layout& layout) {
  const QuantSpec spec = *source->quantization().weights;
  const bool grouped = spec.strategy == Strategy::kGroup;
  const auto plan_linear = [=](ExportPlan& plan, const SourceLinear& linear) {
    const int64_t rows = linear.out_features, columns = linear.in_features;
    const int64_t groups = grouped ? columns / spec.group_size : 1;
    const auto quantized = [=]() -> const QuantizedWeight& { return *source->linear(linear).quantized; };
    const auto words = [&](int64_t count) { return count * spec.num_bits / 32; };
    const std::vector<int64_t> shape =
        layout.g_idx ? std::vector<int64_t>{words(columns), rows} : std::vector<int64_t>{columns, words(rows)};
    plan.tensors.push_back(
        {linear.full_name + ".qweight", at::kInt, shape, [=] { return layout.pack_codes(quantized().codes); }});
    plan.tensors.push_back(
        {linear.full_name + ".qzeros", at::kInt, {groups, words(rows)}, [=] {
           const Tensor& zero_point = quantized().qparams.zero_point;
           return layout.pack_zero_points(zero_point.defined() ? zero_point : at::zeros({rows, groups}));
         }});
    plan.tensors.push_back({linear.full_name + ".scales", at::kHalf, {groups, rows}, [=] {
                              return quantized().qparams.scale.t().to(at::kHalf).contiguous();
                            }});
    if (layout.g_idx) {
      plan.tensors.push_back(
          {linear.full_name + ".g_idx", at::kInt, {columns}, [=] { return group_indices(columns, groups); }});
    }
  };
  const auto check_linear = [=](const Checkpoint& written, const SourceLinear& linear) {
    expect_written(dequantize_written(written, linear, layout), source->linear(linear).weight,
                   linear.full_name + ".qweight");
    if (!layout.g_idx) return;
    const std::string name = linear.full_name + ".g_idx";
    const int64_t groups = written.tensor(linear.full_name + ".scales").size(0);
    expect_written(written.tensor(name), group_indices(linear.in_features, groups), name);
  };
  ExportPlan plan = plan_dense_parts(source, dtype, plan_linear, check_linear);
  const int64_t multiple = words_multiple(spec.num_bits);
  plan.notes.push_back(
      tensor_parallel_note(*source, multiple, std::lcm(layout.g_idx ? multiple : 1, grouped ? spec.group_size : 1)));
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
  const GptqVersion version = spec.symmetric ? GptqVersion::kV1 : GptqVersion::kV2;
  const Layout layout = gptq_layout(spec.num_bits, version);
  preflight(*source, layout, "w4-gptq");
  ExportPlan plan = plan_layout(source, dtype, layout);
  const json config{{"quant_method", "gptq"},
                    {"bits", spec.num_bits},
                    {"group_size", group_size(spec)},
                    {"desc_act", false},
                    {"sym", spec.symmetric},
                    {"lm_head", false},
                    {"checkpoint_format", version == GptqVersion::kV1 ? "gptq" : "gptq_v2"},
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
  const Layout layout = awq_layout();
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
