#include "io/machine_limits.h"

#include <algorithm>
#include <charconv>
#include <fstream>
#include <sstream>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <vector>

namespace baseq {
namespace {

namespace fs = std::filesystem;

/// `/proc/self/mountinfo` writes blanks and backslashes of paths as three octal digits.
std::string unescaped(const std::string& text) {
  std::string result;
  for (size_t i = 0; i < text.size(); ++i) {
    const bool escaped = text[i] == '\\' && i + 3 < text.size() && text[i + 1] >= '0' && text[i + 1] <= '3';
    if (!escaped) {
      result += text[i];
      continue;
    }
    result += static_cast<char>((text[i + 1] - '0') * 64 + (text[i + 2] - '0') * 8 + (text[i + 3] - '0'));
    i += 3;
  }
  return result;
}

bool has_word(const std::string& list, std::string_view word) {
  std::istringstream words(list);
  for (std::string one; std::getline(words, one, ',');) {
    if (one == word) return true;
  }
  return false;
}

/// The number that a file begins with; nothing for "max", -1 and what cannot be read.
std::optional<int64_t> number_in(const fs::path& file) {
  std::ifstream stream(file);
  int64_t number = 0;
  if (!(stream >> number) || number < 0) return std::nullopt;
  return number;
}

/// Of a file of lines "key number", or "key: number kB".
std::optional<int64_t> number_of(const fs::path& file, std::string_view key) {
  std::ifstream stream(file);
  std::string word, rest;
  for (int64_t number = 0; stream >> word >> number; std::getline(stream, rest)) {
    if (word == key) return number;
  }
  return std::nullopt;
}

/// The control group of this process for a controller of version 1, or the one of version 2 for "".
std::optional<std::string> group_of(const fs::path& root, std::string_view controller) {
  std::ifstream stream(root / "proc/self/cgroup");
  for (std::string line; std::getline(stream, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == line.npos || second == line.npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (controller.empty() ? line.starts_with("0::") : has_word(controllers, controller)) {
      return line.substr(second + 1);
    }
  }
  return std::nullopt;
}

/// The directories of that group and of all above it that can be seen from here.
std::vector<fs::path> group_directories(const fs::path& root, std::string_view controller) {
  const std::optional<std::string> group = group_of(root, controller);
  if (!group) return {};
  std::ifstream stream(root / "proc/self/mountinfo");
  for (std::string line; std::getline(stream, line);) {
    // id parent device root mount-point options ... - type source super-options
    std::istringstream fields(line);
    std::string skipped, mount_root, mount_point, type, super_options;
    fields >> skipped >> skipped >> skipped >> mount_root >> mount_point;
    while (fields >> skipped && skipped != "-") {
    }
    fields >> type >> skipped >> super_options;
    const bool wanted =
        controller.empty() ? type == "cgroup2" : type == "cgroup" && has_word(super_options, controller);
    if (!wanted) continue;
    const fs::path top = root / fs::path(unescaped(mount_point)).relative_path();
    // In a container the mount may begin at the group itself, or the group lie outside of what is mounted.
    const fs::path below = fs::path(*group).lexically_relative(unescaped(mount_root));
    std::vector<fs::path> directories{top};
    if (below.empty() || *below.begin() == "..") return directories;
    for (const fs::path& part : below) {
      if (part == "..") break;
      if (part != "." && !part.empty()) directories.push_back(directories.back() / part);
    }
    return directories;
  }
  return {};
}

struct MemoryFiles {
  const char *controller, *limit, *usage, *droppable;
};
constexpr MemoryFiles kMemoryFiles[] = {
    {"", "memory.max", "memory.current", "inactive_file"},
    {"memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"}};

/// CPUs that a group's quota pays for; nothing without one.
std::optional<int64_t> quota_of(const fs::path& directory, bool version2) {
  int64_t quota = 0, period = 0;
  if (version2) {
    std::ifstream stream(directory / "cpu.max");  // "max 100000" or "150000 100000"
    if (!(stream >> quota >> period)) return std::nullopt;
  } else {
    quota = number_in(directory / "cpu.cfs_quota_us").value_or(0);
    period = number_in(directory / "cpu.cfs_period_us").value_or(0);
  }
  if (quota <= 0 || period <= 0) return std::nullopt;
  return (quota - 1) / period + 1;
}

/// Of "0-3,8": 5.
std::optional<int64_t> count_in_list(const std::string& list) {
  int64_t count = 0;
  std::istringstream ranges(list);
  for (std::string range; std::getline(ranges, range, ',');) {
    int64_t first = 0, last = 0;
    const char* end = range.data() + range.size();
    auto parsed = std::from_chars(range.data(), end, first);
    if (parsed.ec != std::errc()) return std::nullopt;
    last = first;
    if (parsed.ptr != end) parsed = std::from_chars(parsed.ptr + 1, end, last);
    if (parsed.ec != std::errc() || last < first) return std::nullopt;
    count += last - first + 1;
  }
  return count > 0 ? std::optional(count) : std::nullopt;
}

/// How many CPUs the scheduler may run this process on.
std::optional<int64_t> allowed_cpus(const fs::path& root) {
  constexpr std::string_view kKey = "Cpus_allowed_list:";
  std::ifstream stream(root / "proc/self/status");
  for (std::string line; std::getline(stream, line);) {
    if (!line.starts_with(kKey)) continue;
    const size_t begin = line.find_first_not_of(" \t", kKey.size());
    return begin == line.npos ? std::nullopt : count_in_list(line.substr(begin));
  }
  return std::nullopt;
}

}  // namespace

std::optional<int64_t> available_memory(const fs::path& root) {
  std::optional<int64_t> available;
  const auto limit_to = [&](int64_t bytes) { available = std::min(available.value_or(bytes), bytes); };
  if (const auto kibibytes = number_of(root / "proc/meminfo", "MemAvailable:")) limit_to(*kibibytes * 1024);
  for (const MemoryFiles& files : kMemoryFiles) {
    for (const fs::path& group : group_directories(root, files.controller)) {
      const auto limit = number_in(group / files.limit), usage = number_in(group / files.usage);
      if (!limit || !usage) continue;
      const int64_t droppable = number_of(group / "memory.stat", files.droppable).value_or(0);
      limit_to(std::max<int64_t>(0, *limit - std::max<int64_t>(0, *usage - droppable)));
    }
  }
  return available;
}

int usable_cpus(const fs::path& root) {
  int64_t cpus = allowed_cpus(root).value_or(std::max(1U, std::thread::hardware_concurrency()));
  for (const char* controller : {"", "cpu"}) {
    for (const fs::path& group : group_directories(root, controller)) {
      if (const auto quota = quota_of(group, *controller == '\0')) cpus = std::min(cpus, *quota);
    }
  }
  return static_cast<int>(std::clamp<int64_t>(cpus, 1, 4096));
}

}  // namespace baseq
