#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>

/// What this process may use of the machine. Containers, batch systems (Slurm) and service managers limit it by control
/// groups, versions 1 and 2, and by the CPUs that a process may run on: the size of the machine says little.
/// `root` is where /proc and /sys are; tests have their own.
namespace baseq {

/// Bytes that can still be allocated: what the kernel would give without swapping, and what the memory limits of the
/// process's control group and of all above it leave. Pages of files that a group can drop count as free. Nothing where
/// the system says none of it.
std::optional<int64_t> available_memory(const std::filesystem::path& root = "/");

/// CPUs that the process may run on, and no more than the quotas of its control groups pay for, rounded up. At least 1.
int usable_cpus(const std::filesystem::path& root = "/");

}  // namespace baseq
