#include "weight_memory.h"

#include <ATen/ATen.h>
#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <mutex>

namespace baseq {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20, kChunk = 8 * kHugePage, kLine = 64;

int64_t rounded_to(int64_t bytes, int64_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }

/// Mapped memory that becomes resident as it is touched.
class Chunk {
 public:
  explicit Chunk(int64_t bytes) : mapped_(bytes + kHugePage) {
    memory_ = mmap(nullptr, static_cast<size_t>(mapped_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(memory_ != MAP_FAILED, "no memory for ", bytes, " bytes of weights");
    const auto address = reinterpret_cast<uintptr_t>(memory_);
    next_ = static_cast<uint8_t*>(memory_) +
            (rounded_to(static_cast<int64_t>(address), kHugePage) - static_cast<int64_t>(address));
    end_ = next_ + bytes;
#if defined(MADV_HUGEPAGE)
    // Where it is refused, small pages serve as well.
    madvise(next_, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
  }
  Chunk(const Chunk&) = delete;
  Chunk& operator=(const Chunk&) = delete;
  ~Chunk() { munmap(memory_, static_cast<size_t>(mapped_)); }

  /// Null when it is full.
  uint8_t* take(int64_t bytes) {
    if (end_ - next_ < bytes) return nullptr;
    uint8_t* result = next_;
    next_ += rounded_to(bytes, kLine);
    return result;
  }

 private:
  int64_t mapped_;
  void* memory_;
  uint8_t *next_, *end_;
};

}  // namespace

Tensor weight_memory(int64_t bytes) {
  static std::mutex mutex;
  static std::weak_ptr<Chunk> current;
  const std::lock_guard lock(mutex);
  std::shared_ptr<Chunk> chunk = current.lock();
  uint8_t* memory = chunk ? chunk->take(bytes) : nullptr;
  if (memory == nullptr) {
    chunk = std::make_shared<Chunk>(std::max(kChunk, rounded_to(bytes, kHugePage)));
    memory = chunk->take(bytes);
    current = chunk;
  }
  return at::from_blob(
      memory, {bytes}, [chunk](void*) {}, at::kByte);
}

}  // namespace baseq
