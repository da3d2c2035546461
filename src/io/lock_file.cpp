#include "io/lock_file.h"

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "files.h"

namespace baseq {
namespace {

/// Whether the open file still has the name `path`.
bool has_name(int descriptor, const std::filesystem::path& path) {
  struct stat opened {
  }, named{};
  return ::fstat(descriptor, &opened) == 0 && ::lstat(path.c_str(), &named) == 0 && opened.st_dev == named.st_dev &&
         opened.st_ino == named.st_ino;
}

}  // namespace

LockFile::LockFile(std::string_view who, const std::filesystem::path& path, const std::string& held) : path_(path) {
  while (true) {
    const int descriptor = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
    if (descriptor < 0) throw_system_error(who, "create", path, errno);
    if (::flock(descriptor, LOCK_EX | LOCK_NB) != 0) {
      const int error = errno;
      ::close(descriptor);
      TORCH_CHECK(error != EWOULDBLOCK, who, ": ", held);
      throw_system_error(who, "lock", path, error);
    }
    // Whoever held it may have removed it between the two calls; a lock on a file without a name keeps nobody out.
    if (has_name(descriptor, path)) {
      descriptor_ = descriptor;
      return;
    }
    ::close(descriptor);
  }
}

LockFile::~LockFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

LockFile::LockFile(LockFile&& other) noexcept
    : path_(std::move(other.path_)), descriptor_(std::exchange(other.descriptor_, -1)) {}

void LockFile::remove() { ::unlink(path_.c_str()); }

bool LockFile::is_held(const std::filesystem::path& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (descriptor < 0) return false;
  const FileDescriptor file(descriptor);
  return ::flock(descriptor, LOCK_SH | LOCK_NB) != 0 && errno == EWOULDBLOCK;
}

}  // namespace baseq
