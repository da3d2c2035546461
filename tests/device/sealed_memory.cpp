#include "sealed_memory.h"

#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <unordered_map>

namespace baseq::test {
namespace {

constexpr int64_t kPage = 4096;
/// Free blocks that are kept for the next tensor of the same size: fresh pages cost more than most operations.
constexpr int64_t kMostKept = int64_t{64} << 20;

struct Block {
  int64_t size = 0;
  int users = 0;  ///< operations that have it open
};

/// Never destroyed: tensors of static objects outlive every order of destruction.
struct Blocks {
  std::mutex mutex;
  std::unordered_map<void*, Block> live;
  std::multimap<int64_t, void*> kept;
  int64_t kept_bytes = 0, live_bytes = 0, peak_bytes = 0;
  int64_t limit = std::numeric_limits<int64_t>::max();
};
Blocks& blocks() {
  static auto& all = *new Blocks;
  return all;
}

void protect(void* address, int64_t size, int rights) {
  TORCH_INTERNAL_ASSERT(::mprotect(address, static_cast<size_t>(size), rights) == 0);
}

/// Pages that may be written.
void* open_pages(int64_t size) {
  Blocks& all = blocks();
  if (const auto it = all.kept.find(size); it != all.kept.end()) {
    void* address = it->second;
    all.kept.erase(it);
    all.kept_bytes -= size;
    protect(address, size, PROT_READ | PROT_WRITE);
    return address;
  }
  void* address = ::mmap(nullptr, static_cast<size_t>(size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TORCH_CHECK(address != MAP_FAILED, "sealed memory: no pages for ", size, " bytes");
  return address;
}

}  // namespace

SealedMemory& SealedMemory::instance() {
  static SealedMemory memory;
  return memory;
}

c10::DataPtr SealedMemory::allocate(int64_t num_bytes) {
  const c10::Device device(c10::DeviceType::PrivateUse1, 0);
  if (num_bytes == 0) return {nullptr, device};
  const int64_t size = (num_bytes + kPage - 1) / kPage * kPage;
  Blocks& all = blocks();
  const std::lock_guard lock(all.mutex);
  TORCH_CHECK_WITH(OutOfMemoryError, all.live_bytes + size <= all.limit, "sealed memory: out of memory: ", num_bytes,
                   " bytes are wanted, ", all.live_bytes, " of ", all.limit, " are taken");
  void* address = open_pages(size);
  std::memset(address, 0xFF, static_cast<size_t>(num_bytes));
  protect(address, size, PROT_NONE);
  all.live[address] = {.size = size};
  all.live_bytes += size;
  all.peak_bytes = std::max(all.peak_bytes, all.live_bytes);
  return {address, address, &SealedMemory::release, device};
}

void SealedMemory::release(void* address) {
  Blocks& all = blocks();
  const std::lock_guard lock(all.mutex);
  const auto it = all.live.find(address);
  TORCH_INTERNAL_ASSERT(it != all.live.end());
  const int64_t size = it->second.size;
  all.live.erase(it);
  all.live_bytes -= size;
  if (all.kept_bytes + size > kMostKept) {
    ::munmap(address, static_cast<size_t>(size));
    return;
  }
  all.kept.emplace(size, address);
  all.kept_bytes += size;
}

void SealedMemory::open(void* address) {
  Blocks& all = blocks();
  const std::lock_guard lock(all.mutex);
  Block& block = all.live.at(address);
  if (block.users++ == 0) protect(address, block.size, PROT_READ | PROT_WRITE);
}

void SealedMemory::close(void* address) {
  Blocks& all = blocks();
  const std::lock_guard lock(all.mutex);
  Block& block = all.live.at(address);
  if (--block.users == 0) protect(address, block.size, PROT_NONE);
}

void SealedMemory::set_limit(int64_t num_bytes) {
  const std::lock_guard lock(blocks().mutex);
  blocks().limit = num_bytes;
}
int64_t SealedMemory::limit() const {
  const std::lock_guard lock(blocks().mutex);
  return blocks().limit;
}
int64_t SealedMemory::live_bytes() const {
  const std::lock_guard lock(blocks().mutex);
  return blocks().live_bytes;
}
int64_t SealedMemory::peak_bytes() const {
  const std::lock_guard lock(blocks().mutex);
  return blocks().peak_bytes;
}
void SealedMemory::reset_peak() {
  const std::lock_guard lock(blocks().mutex);
  blocks().peak_bytes = blocks().live_bytes;
}

Opened::Opened(std::initializer_list<const c10::Storage*> storages) {
  for (const c10::Storage* storage : storages) {
    if (storage->device_type() != c10::DeviceType::PrivateUse1 || storage->data() == nullptr) continue;
    blocks_.push_back(const_cast<void*>(storage->data()));
    SealedMemory::instance().open(blocks_.back());
  }
}

Opened::~Opened() {
  for (void* block : blocks_) SealedMemory::instance().close(block);
}

}  // namespace baseq::test
