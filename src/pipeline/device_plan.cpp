#include "device_plan.h"

#include <ATen/Context.h>
#include <fmt/format.h>
#include <torch/version.h>

#include <algorithm>
#include <limits>

#include "io/units.h"

// Allocators tell what is free since LibTorch 2.10.
#define BASEQ_TELLS_MEMORY (TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 10)
#if BASEQ_TELLS_MEMORY
#include <c10/core/CachingDeviceAllocator.h>
#endif

namespace baseq {
namespace {

/// Bytes that are free on a device other than the CPU; nothing where LibTorch does not say.
std::optional<int64_t> free_device_memory(at::Device device) {
#if BASEQ_TELLS_MEMORY
  at::globalContext().lazyInitDevice(device.type());
  auto* allocator = dynamic_cast<c10::DeviceAllocator*>(c10::GetAllocator(device.type()));
  if (allocator == nullptr) return std::nullopt;
  constexpr auto kMost = static_cast<size_t>(std::numeric_limits<int64_t>::max());
  return static_cast<int64_t>(
      std::min(allocator->getMemoryInfo(std::max<c10::DeviceIndex>(0, device.index())).first, kMost));
#else
  (void)device;
  return std::nullopt;
#endif
}

}  // namespace

DevicePlan plan_device(const Job& job, const ModelConfig& config, RunShape shape) {
  const QuantizeOptions& options = job.options;
  if (options.device.is_cpu()) return {};
  const bool given = options.device_memory > 0;
  const std::optional<int64_t> budget = given ? options.device_memory : free_device_memory(options.device);
  shape.streams_on_device = options.activations_directory.empty();
  DevicePlan plan{.memory = quantization_device_memory(config, job.recipe, shape),
                  .streams_on_device = shape.streams_on_device};
  if (!budget || plan.memory.bytes() <= *budget) return plan;
  shape.streams_on_device = false;
  plan.memory = quantization_device_memory(config, job.recipe, shape);
  plan.streams_on_device = false;
  if (plan.memory.bytes() <= *budget) return plan;
  plan.problem = fmt::format(
      "device memory: about {} needed on {} with the activation streams on the host, {} {}; fewer `tokens_per_batch` "
      "or "
      "a smaller calibration.seq_len need less",
      format_bytes(plan.memory.bytes()), options.device.str(), format_bytes(*budget), given ? "given" : "free");
  return plan;
}

}  // namespace baseq
