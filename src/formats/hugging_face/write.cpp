#include <ATen/ATen.h>

#include "formats/export_source.h"

namespace baseq {

ExportPlan plan_hugging_face(std::shared_ptr<const ExportSource> source, at::ScalarType dtype) {
  Obstacles obstacles(*source, "hf");
  obstacles.add_activations();
  obstacles.refuse(kWeightsAlone);

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
