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

/// Bytes that are free on a device other than the CPU; nothing where LibTorch does not say.
std::optional<int64_t> free_device_memory(at::Device device);

}  // namespace baseq
