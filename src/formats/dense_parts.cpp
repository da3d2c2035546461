#include <ATen/ATen.h>

#include "formats/export_source.h"
#include "io/side_files.h"

namespace baseq {
namespace {

/// config.json says "dtype" since transformers 4.56 and "torch_dtype" before; both are read.
void set_dtype(nlohmann::json& config, at::ScalarType dtype) {
  config[config.contains("dtype") ? "dtype" : "torch_dtype"] = torch_dtype_name(dtype);
  if (config.contains("torch_dtype")) config["torch_dtype"] = torch_dtype_name(dtype);
}

/// The source's without quantization and with the flags of the biases that are written.
nlohmann::json dense_config(const ExportSource& source, at::ScalarType dtype) {
  nlohmann::json config = source.checkpoint().config();
  config.erase("quantization_config");
  remove_code_references(config);
  for (const SourceLinear& linear : source.linears()) {
    if (source.has_bias_flag(linear)) {
      config[is_attention(linear) ? "attention_bias" : "mlp_bias"] = source.writes_bias(linear);
    }
  }
  set_dtype(config, dtype);
  return config;
}

}  // namespace

void expect_written(const Tensor& written, const Tensor& source, const std::string& name) {
  TORCH_CHECK(written.scalar_type() == source.scalar_type() && at::equal(written, source), "export: ", name,
              " read back from the output differs from the source");
}

ExportPlan plan_dense_parts(std::shared_ptr<const ExportSource> source, at::ScalarType dtype,
                            const std::function<void(ExportPlan&, const SourceLinear&)>& plan_linear,
                            const std::function<void(const Checkpoint&, const SourceLinear&)>& check_linear) {
  ExportPlan plan;
  const auto other = [&from = *source, dtype](const std::string& name) {
    const Tensor tensor = from.other(name);
    return tensor.is_floating_point() ? tensor.to(dtype) : tensor;
  };
  for (const std::string& name : source->others()) {
    const TensorInfo stored = source->other_info(name);
    plan.tensors.push_back({name, at::isFloatingType(stored.dtype) ? dtype : stored.dtype, stored.shape,
                            [other, name, source] { return other(name); }});
  }
  const auto bias = [source, dtype](const SourceLinear& linear) {
    if (!linear.bias) return at::zeros({linear.out_features}, dtype);
    return source->checkpoint().tensor(linear.full_name + ".bias").to(dtype);
  };
  for (const SourceLinear& linear : source->linears()) {
    plan_linear(plan, linear);
    if (source->writes_bias(linear)) {
      plan.tensors.push_back(
          {linear.full_name + ".bias", dtype, {linear.out_features}, [bias, linear] { return bias(linear); }});
    }
  }
  plan.config = dense_config(*source, dtype);
  if (source->has_online_transform(Site::kQueryKey)) {
    plan.notes.push_back(
        "The online transform of queries and keys is left out: without a quantized cache the two sides cancel.");
  }
  plan.check_weights = [=](const Checkpoint& written, const std::function<void()>& step) {
    for (const std::string& name : source->others()) {
      step();
      expect_written(written.tensor(name), other(name), name);
    }
    for (const SourceLinear& linear : source->linears()) {
      step();
      check_linear(written, linear);
      const std::string name = linear.full_name + ".bias";
      if (source->writes_bias(linear)) expect_written(written.tensor(name), bias(linear), name);
      written.release_pages();
    }
  };
  return plan;
}

}  // namespace baseq
