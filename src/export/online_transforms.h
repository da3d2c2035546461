#pragma once

#include "export_source.h"

/// Online Hadamard transforms in a compressed-tensors checkpoint. Not installed.
namespace baseq {

/// Adds `transform_config` to the plan's quantization_config, the matrices that it needs to the tensors, and to the
/// notes and the directory's README.md which programs execute them. Without online transforms it adds nothing.
void add_transforms(ExportPlan& plan, const std::shared_ptr<const ExportSource>& source, at::ScalarType dtype);

}  // namespace baseq
