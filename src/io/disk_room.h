#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace baseq {

/// Bytes that will be written below a directory, which need not exist yet.
struct DiskNeed {
  std::filesystem::path directory;
  int64_t num_bytes = 0;
};

/// Sentences that say which of the directories cannot be written, and which disks have too little room for everything
/// that goes to them; empty when all is well.
std::vector<std::string> find_disk_problems(const std::vector<DiskNeed>& needs);

}  // namespace baseq
