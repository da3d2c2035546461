#include <ATen/ATen.h>

#include "formats/export_source.h"

namespace baseq {
namespace {

using nlohmann::json;

constexpr const char* kWeights = "adapter/adapter_model.safetensors";
constexpr const char* kConfig = "adapter/adapter_config.json";

/// What of a linear's weight is in the base checkpoint, float32.
Tensor base_weight(const ExportSource& source, const SourceLinear& which) {
  return source.merged(which, source.linear(which).quantized->dequantized());
}

/// A factor in the adapter's rank: a weight with a shorter side has less, the rest is zeros.
Tensor lora_a(const ExportSource& source, const SourceLinear& which, at::ScalarType dtype) {
  const Tensor factor = source.merged(which, source.linear(which).lora.dequantized_A());
  return at::constant_pad_nd(factor, {0, 0, 0, source.quantization().lora_rank - factor.size(0)}).to(dtype);
}

Tensor lora_b(const ExportSource& source, const SourceLinear& which, at::ScalarType dtype) {
  const Tensor factor = source.linear(which).lora.dequantized_B();
  return at::constant_pad_nd(factor, {0, source.quantization().lora_rank - factor.size(1)}).to(dtype);
}

/// peft computes W x + lora_alpha / r * B (A x): here the factor is 1.
json adapter_config(const ExportSource& source) {
  json modules = json::array();
  for (const SourceLinear& linear : source.linears()) {
    if (linear.block == 0) modules.push_back(linear.name.substr(linear.name.rfind('.') + 1));
  }
  const int64_t rank = source.quantization().lora_rank;
  return {{"peft_type", "LORA"},
          {"task_type", "CAUSAL_LM"},
          {"base_model_name_or_path", nullptr},
          {"r", rank},
          {"lora_alpha", rank},
          {"use_rslora", false},
          {"lora_dropout", 0.0},
          {"bias", "none"},
          {"fan_in_fan_out", false},
          {"target_modules", std::move(modules)},
          {"inference_mode", true}};
}

}  // namespace

ExportPlan plan_peft(std::shared_ptr<const ExportSource> source, at::ScalarType dtype) {
  TORCH_CHECK(source->quantization().lora_rank > 0, source->path(),
              ": there are no low-rank corrections that format peft could write as an adapter; quantize again with a "
              "recipe whose round step has low_rank, or choose format hf");
  for (const SourceLinear& linear : source->linears()) {
    TORCH_CHECK(linear.format.weights, source->path(), ": ", linear.full_name,
                " is in full precision and has no correction; choose format hf, which carries such linears");
    TORCH_CHECK(linear.parts.size() == 1, source->path(), ": ", source->config().architecture, " stacks ",
                linear.parts.size(), " linears in ", linear.full_name,
                ", whose corrections have no common lora_A; choose format hf, which folds them into the weights");
  }
  Obstacles obstacles(*source, "peft");
  obstacles.add_activations();
  obstacles.refuse(kWeightsAlone);
  const int64_t rank = source->quantization().lora_rank;
  const auto plan_linear = [=](ExportPlan& plan, const SourceLinear& linear) {
    const std::string factor = "base_model.model." + linear.full_name;
    plan.tensors.push_back({linear.full_name + ".weight", dtype, {linear.out_features, linear.in_features}, [=] {
                              return base_weight(*source, linear).to(dtype);
                            }});
    plan.tensors.push_back({.name = factor + ".lora_A.weight",
                            .dtype = dtype,
                            .shape = {rank, linear.in_features},
                            .make = [=] { return lora_a(*source, linear, dtype); },
                            .file = kWeights});
    plan.tensors.push_back({.name = factor + ".lora_B.weight",
                            .dtype = dtype,
                            .shape = {linear.out_features, rank},
                            .make = [=] { return lora_b(*source, linear, dtype); },
                            .file = kWeights});
  };
  const auto check_linear = [=](const Checkpoint& written, const SourceLinear& linear) {
    const std::string name = linear.full_name + ".weight", factor = "base_model.model." + linear.full_name;
    expect_written(written.tensor(name), base_weight(*source, linear).to(dtype), name);
    const SafetensorsFile adapter(written.path() / kWeights);
    expect_written(adapter.tensor(factor + ".lora_A.weight"), lora_a(*source, linear, dtype), factor);
    expect_written(adapter.tensor(factor + ".lora_B.weight"), lora_b(*source, linear, dtype), factor);
  };
  ExportPlan plan = plan_dense_parts(source, dtype, plan_linear, check_linear);
  plan.files[kConfig] = adapter_config(*source).dump(2) + "\n";
  plan.notes.push_back("The directory is the model without the low-rank corrections; adapter/ holds them for peft.");
  return plan;
}

}  // namespace baseq
