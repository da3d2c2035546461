#pragma once

#include <c10/core/Storage.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

namespace baseq::test {

/// The memory of the sealed device: pages without any rights, of which an operation opens those that it touches.
class SealedMemory {
 public:
  static SealedMemory& instance();

  c10::DataPtr allocate(int64_t num_bytes);
  void open(void* block);
  void close(void* block);

  void set_limit(int64_t num_bytes);
  int64_t limit() const;
  int64_t live_bytes() const;
  int64_t peak_bytes() const;
  void reset_peak();

 private:
  SealedMemory() = default;
  static void release(void* block);
};

/// While this lives, the host may touch the memory of these storages. Undefined and host tensors are left alone.
class Opened {
 public:
  explicit Opened(std::initializer_list<const c10::Storage*> storages);
  ~Opened();
  Opened(const Opened&) = delete;
  Opened& operator=(const Opened&) = delete;

 private:
  std::vector<void*> blocks_;
};

}  // namespace baseq::test
