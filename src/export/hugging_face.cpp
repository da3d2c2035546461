#include <ATen/ATen.h>

#include "export_source.h"

namespace baseq {

ExportPlan plan_hugging_face(std::shared_ptr<const ExportSource> source, at::ScalarType dtype) {
  const QuantizationConfig& quantization = source->quantization();
  Obstacles obstacles(*source, "hf");
  obstacles.add_if(quantization.input_activations.has_value(), "quantized activations (input_activations)");
  obstacles.add_if(quantization.kv_cache.has_value(), "a quantized cache (kv_cache)");
  obstacles.add_if(
      !quantization.input_activations && (source->has_quant_tensor(".gain") || source->has_quant_tensor(".shift")),
      "gains and shifts of activations");
  obstacles.refuse(
      "quantize again with a recipe for weights alone, such as configs/w4a16-vllm.json, or with --set "
      "input_activations=null --set kv_cache=null");

  const auto plan_linear = [=](ExportPlan& plan, const SourceLinear& linear) {
    plan.tensors.push_back({linear.full_name + ".weight", dtype, {linear.out_features, linear.in_features}, [=] {
                              return source->merged_weight(linear).to(dtype);
                            }});
  };
  const auto check_linear = [=](const Checkpoint& written, const SourceLinear& linear) {
    const std::string name = linear.full_name + ".weight";
    expect_written(written.tensor(name), source->merged_weight(linear).to(dtype), name);
  };
  return plan_dense_parts(source, dtype, plan_linear, check_linear);
}

}  // namespace baseq
