#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <string>

namespace baseq::test {

/// A device that computes as the CPU does, in memory that the host cannot touch: reading or writing a tensor of it
/// outside an operation ends the process with SIGSEGV. It stands in for a GPU where there is none: what runs on it reads
/// no device memory from the host, mixes no devices and gives each operation all of its inputs there. What it cannot
/// show is anything about speed, about the rounding of a GPU's own kernels, or about asynchronous work.
///
/// Memory that was not written holds bytes of 0xFF, which is NaN in every floating type.
at::Device sealed_device();

/// What was asked of the device.
struct DeviceWork {
  int64_t operations = 0;  ///< on a GPU about one launch each; views and allocations do not count
  int64_t scalars = 0;     ///< .item() and what is built from it: the host waits for all operations before
  int64_t to_host = 0, to_device = 0;    ///< copies of tensors
  std::map<std::string, int64_t> names;  ///< of the operations
};

/// The work between its construction and now.
class CountedWork {
 public:
  CountedWork();
  DeviceWork so_far() const;

 private:
  DeviceWork before_;
};

/// The device's memory is this large while an object of this class lives; more is c10::OutOfMemoryError.
class LimitedMemory {
 public:
  explicit LimitedMemory(int64_t num_bytes);
  ~LimitedMemory();
  LimitedMemory(const LimitedMemory&) = delete;
  LimitedMemory& operator=(const LimitedMemory&) = delete;
};

/// Bytes of tensors on the device, and the most that there were since reset_peak_bytes().
int64_t live_bytes();
int64_t peak_bytes();
void reset_peak_bytes();

}  // namespace baseq::test
