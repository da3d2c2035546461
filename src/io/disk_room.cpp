#include "io/disk_room.h"

#include <fmt/format.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <map>
#include <system_error>

#include "io/units.h"

namespace baseq {
namespace {

namespace fs = std::filesystem;

/// The directory itself, or the nearest one above it that is there.
fs::path existing(fs::path path) {
  std::error_code error;
  path = fs::absolute(path, error);
  while (!fs::is_directory(path, error) && path.has_relative_path()) path = path.parent_path();
  return path;
}

}  // namespace

std::vector<std::string> find_disk_problems(const std::vector<DiskNeed>& needs) {
  struct Disk {
    std::string directories;
    int64_t needed = 0, available = 0;
  };
  std::vector<std::string> problems;
  std::map<uint64_t, Disk> disks;
  for (const DiskNeed& need : needs) {
    const fs::path directory = existing(need.directory);
    if (::access(directory.c_str(), W_OK | X_OK) != 0) {
      const std::string problem =
          fmt::format("{}: cannot be written: {}", directory.string(), std::generic_category().message(errno));
      if (std::find(problems.begin(), problems.end(), problem) == problems.end()) problems.push_back(problem);
      continue;
    }
    struct stat status {};
    struct statvfs room {};
    if (::stat(directory.c_str(), &status) != 0 || ::statvfs(directory.c_str(), &room) != 0) continue;
    Disk& disk = disks[status.st_dev];
    if (disk.directories.find(directory.string()) == std::string::npos) {
      disk.directories += (disk.directories.empty() ? "" : ", ") + directory.string();
    }
    disk.needed += need.num_bytes;
    disk.available = static_cast<int64_t>(room.f_bavail) * static_cast<int64_t>(room.f_frsize);
  }
  for (const auto& [id, disk] : disks) {
    if (disk.needed > disk.available) {
      problems.push_back(fmt::format("{}: {} will be written but {} are free", disk.directories,
                                     format_bytes(disk.needed), format_bytes(disk.available)));
    }
  }
  return problems;
}

}  // namespace baseq
