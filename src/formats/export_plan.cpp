#include "baseq/formats/export_plan.h"

#include <ATen/ATen.h>

#include <numeric>

#include "formats/export_source.h"
#include "io/dtype_name.h"

namespace baseq {

Tensor made(const PlannedTensor& planned) {
  const Tensor tensor = planned.make();
  TORCH_INTERNAL_ASSERT(tensor.scalar_type() == planned.dtype && tensor.sizes() == planned.shape,
                        "export: ", planned.name, " was planned as ", planned.dtype, " ", planned.shape, " but is ",
                        tensor.scalar_type(), " ", tensor.sizes());
  TORCH_CHECK(!tensor.is_floating_point() || at::isfinite(tensor).all().item<bool>(), "export: ", planned.name,
              " has values that ", planned.dtype, " cannot hold; choose another dtype");
  return tensor;
}

int64_t PlannedTensor::num_bytes() const {
  const int64_t count = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
  return count * static_cast<int64_t>(c10::elementSize(dtype));
}

std::vector<ExportedTensor> ExportPlan::exported_tensors() const {
  if (single_file) return single_file->tensors;
  std::vector<ExportedTensor> exported;
  for (const PlannedTensor& tensor : tensors) exported.push_back({tensor.name, dtype_name(tensor.dtype), tensor.shape});
  return exported;
}

int64_t ExportPlan::num_bytes() const {
  return std::accumulate(tensors.begin(), tensors.end(), int64_t{0},
                         [](int64_t sum, const PlannedTensor& tensor) { return sum + tensor.num_bytes(); });
}

}  // namespace baseq
