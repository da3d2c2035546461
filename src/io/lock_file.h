#pragma once

#include <filesystem>
#include <string>
#include <string_view>

namespace baseq {

/// A file that one process at a time holds. The lock is the system's (flock): it ends with the process, however that
/// ends.
class LockFile {
 public:
  /// Makes `path` where it is missing and takes the lock. Throws c10::Error "`who`: `held`" when somebody else has it,
  /// and one that names the path when the file cannot be made or its file system has no locks.
  LockFile(std::string_view who, const std::filesystem::path& path, const std::string& held);
  ~LockFile();
  LockFile(LockFile&& other) noexcept;
  LockFile(const LockFile&) = delete;
  LockFile& operator=(const LockFile&) = delete;
  LockFile& operator=(LockFile&&) = delete;
  /// Removes the file. Who waits for its name makes a new one.
  void remove();
  /// Whether somebody holds `path` now. Changes nothing.
  static bool is_held(const std::filesystem::path& path);

 private:
  std::filesystem::path path_;
  int descriptor_ = -1;
};

}  // namespace baseq
