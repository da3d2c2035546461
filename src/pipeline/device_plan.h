#pragma once

#include <optional>
#include <string>

#include "baseq/pipeline/job.h"
#include "pipeline/footprint.h"

namespace baseq {

/// What a job does with the memory of its device.
struct DevicePlan {
  Footprint memory;                ///< without parts on the CPU
  bool streams_on_device = false;  ///< the activation streams live there
  std::optional<std::string> problem{};
};
DevicePlan plan_device(const Job& job, const ModelConfig& config, RunShape shape);

}  // namespace baseq
