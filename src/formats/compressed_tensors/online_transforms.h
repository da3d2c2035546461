#pragma once

#include "formats/export_source.h"

/// Online transforms in a compressed-tensors checkpoint: one Hadamard transform for all blocks at each site. Not
/// installed.
namespace baseq {

/// Refuses other transforms, and biases after one.
void add_transform_obstacles(Obstacles& obstacles, const ExportSource& source);

/// Adds `transform_config` to the plan's quantization_config, the matrices that it needs to the tensors, and to the
/// notes and the directory's README.md which programs execute them. Without online transforms it adds nothing.
void add_transforms(ExportPlan& plan, const std::shared_ptr<const ExportSource>& source, at::ScalarType dtype);

}  // namespace baseq
