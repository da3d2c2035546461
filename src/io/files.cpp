#include "files.h"

#include <ATen/ATen.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <system_error>
#include <utility>

namespace baseq {
namespace {

constexpr size_t kMaxBytesPerCall = size_t{1} << 30;  // Linux moves at most 2 GiB - 4 KiB in one call

}  // namespace

void throw_system_error(std::string_view who, std::string_view action, const std::filesystem::path& path, int error) {
  TORCH_CHECK(false, who, ": cannot ", action, " ", path.string(), ": ", std::generic_category().message(error));
}

bool path_exists(std::string_view who, const std::filesystem::path& path) {
  std::error_code error;
  const std::filesystem::file_status status = std::filesystem::status(path, error);
  if (status.type() == std::filesystem::file_type::none) {
    throw_system_error(who, "inspect", path, error.value());
  }
  return std::filesystem::exists(status);
}

FileDescriptor::~FileDescriptor() { ::close(value_); }

FileDescriptor open_regular_file(std::string_view who, const std::filesystem::path& path) {
  // Opening a named pipe without O_NONBLOCK would wait for a writer.
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) {
    throw_system_error(who, "open", path, errno);
  }
  struct stat status {};
  const bool regular = ::fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode);
  if (!regular) {
    ::close(descriptor);
    TORCH_CHECK(false, who, ": ", path.string(), " is not a regular file");
  }
  return FileDescriptor(descriptor);
}

size_t size_of(std::string_view who, const FileDescriptor& file, const std::filesystem::path& path) {
  struct stat status {};
  if (::fstat(file.get(), &status) != 0) {
    throw_system_error(who, "inspect", path, errno);
  }
  return static_cast<size_t>(status.st_size);
}

size_t read_bytes(std::string_view who, const FileDescriptor& file, const std::filesystem::path& path, char* data,
                  size_t size) {
  size_t done = 0;
  while (done < size) {
    const ssize_t count = ::read(file.get(), data + done, std::min(size - done, kMaxBytesPerCall));
    if (count < 0 && errno == EINTR) {
      continue;
    }
    if (count < 0) {
      throw_system_error(who, "read", path, errno);
    }
    if (count == 0) {
      break;
    }
    done += static_cast<size_t>(count);
  }
  return done;
}

std::shared_ptr<const void> map_file(std::string_view who, const FileDescriptor& file, size_t size,
                                     const std::filesystem::path& path) {
  void* address = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.get(), 0);
  if (address == MAP_FAILED) throw_system_error(who, "map", path, errno);
  return {static_cast<const void*>(address), [size](const void* p) { ::munmap(const_cast<void*>(p), size); }};
}

std::string read_file(std::string_view who, const std::filesystem::path& path, size_t max_bytes) {
  const FileDescriptor file = open_regular_file(who, path);
  const size_t size = size_of(who, file, path);
  TORCH_CHECK(size <= max_bytes, who, ": ", path.string(), " has ", size, " bytes, expected at most ", max_bytes);
  std::string content(size, '\0');
  TORCH_CHECK(read_bytes(who, file, path, content.data(), size) == size, who, ": ", path.string(),
              " became shorter while it was read");
  return content;
}

void refuse_lfs_pointer(std::string_view content, std::string_view where) {
  TORCH_CHECK(!content.starts_with("version https://git-lfs.github.com/spec/"), where,
              " is a git-lfs pointer and not the file itself; run \"git lfs pull\" in the clone it belongs to");
}

WriteTarget write_target(std::string_view who, const std::filesystem::path& path) {
  namespace fs = std::filesystem;
  constexpr int kMostLinks = 40;  // as many as Linux follows
  WriteTarget target{.path = path};
  std::error_code error;
  for (int links = 0; fs::is_symlink(fs::symlink_status(target.path, error)); ++links) {
    if (links == kMostLinks) throw_system_error(who, "write", path, ELOOP);
    const fs::path directory = target.path.has_parent_path() ? target.path.parent_path() : ".";
    if (fs::equivalent(directory, "/proc/self/fd", error)) {
      target.descriptor = std::atoi(target.path.filename().c_str());
      target.regular = false;
      return target;
    }
    target.path = directory / fs::read_symlink(target.path, error);
  }
  const fs::file_status status = fs::status(target.path, error);
  if (fs::is_directory(status)) throw_system_error(who, "write", path, EISDIR);
  target.regular = !fs::exists(status) || fs::is_regular_file(status);
  return target;
}

FileWriter::FileWriter(std::string_view who, const std::filesystem::path& path) : who_(who) {
  const WriteTarget target = write_target(who_, path);
  path_ = target.path;
  if (target.regular) {
    create_temporary();
    return;
  }
  descriptor_ = target.descriptor >= 0 ? ::fcntl(target.descriptor, F_DUPFD_CLOEXEC, 0)
                                       : ::open(path_.c_str(), O_WRONLY | O_CLOEXEC | O_NOCTTY);
  if (descriptor_ < 0) throw_system_error(who_, "open", path_, errno);
}

void FileWriter::create_temporary() {
  std::filesystem::path temporary = path_;
  temporary += ".baseq.tmp";
  // A link in its place is not followed to wherever it points.
  constexpr int kFlags = O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC;
  descriptor_ = ::open(temporary.c_str(), kFlags, 0666);
  if (descriptor_ < 0 && errno == EEXIST) {
    // What an earlier process left makes way; the file of one that still writes is locked.
    const int other = ::open(temporary.c_str(), O_WRONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    const bool locked = other >= 0 && ::flock(other, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK;
    if (!locked) ::unlink(temporary.c_str());
    if (other >= 0) ::close(other);
    TORCH_CHECK(!locked, who_, ": another process is writing ", path_.string());
    descriptor_ = ::open(temporary.c_str(), kFlags, 0666);
  }
  if (descriptor_ < 0) throw_system_error(who_, "create", temporary, errno);
  // Without a lock where the file system has none.
  struct stat status {};
  const bool locked = ::flock(descriptor_, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK;
  if (!locked || ::fstat(descriptor_, &status) != 0 || status.st_nlink == 0) {
    ::close(descriptor_);
    TORCH_CHECK(false, who_, ": another process is writing ", path_.string());
  }
  temporary_ = temporary;
}

FileWriter::~FileWriter() {
  if (descriptor_ >= 0) {
    ::close(descriptor_);
  }
  if (!temporary_.empty()) {
    ::unlink(temporary_.c_str());
  }
}

namespace {

void write_bytes(std::string_view who, int descriptor, const std::filesystem::path& path, const void* data,
                 size_t num_bytes) {
  const char* next = static_cast<const char*>(data);
  while (num_bytes > 0) {
    const ssize_t count = ::write(descriptor, next, std::min(num_bytes, kMaxBytesPerCall));
    if (count < 0 && errno == EINTR) {
      continue;
    }
    if (count < 0) {
      throw_system_error(who, "write", path, errno);
    }
    next += count;
    num_bytes -= static_cast<size_t>(count);
  }
}

}  // namespace

void FileWriter::write(const void* data, size_t num_bytes) {
  write_bytes(who_, descriptor_, temporary_.empty() ? path_ : temporary_, data, num_bytes);
}

void FileWriter::commit() {
  const std::filesystem::path& written = temporary_.empty() ? path_ : temporary_;
  if (!temporary_.empty() && ::fsync(descriptor_) != 0) {
    throw_system_error(who_, "write", written, errno);
  }
  // Renamed while the lock is held. Network file systems report a full disk at the latest when the file is closed, so
  // another descriptor of it is closed first.
  const int second = temporary_.empty() ? std::exchange(descriptor_, -1) : ::fcntl(descriptor_, F_DUPFD_CLOEXEC, 0);
  if (second < 0 || ::close(second) != 0) {
    throw_system_error(who_, "write", written, errno);
  }
  if (temporary_.empty()) return;
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) {
    throw_system_error(who_, "rename the finished file to", path_, errno);
  }
  temporary_.clear();
}

PieceFile::PieceFile(std::string_view who, const std::filesystem::path& path)
    : who_(who), path_(path), temporary_(path) {
  temporary_ += ".pieces";
  descriptor_ = ::open(temporary_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (descriptor_ < 0) {
    throw_system_error(who_, "create", temporary_, errno);
  }
}

PieceFile::~PieceFile() {
  if (descriptor_ < 0) return;
  ::close(descriptor_);
  ::unlink(temporary_.c_str());
}

void PieceFile::write(const void* data, size_t num_bytes, size_t offset) {
  const char* next = static_cast<const char*>(data);
  while (num_bytes > 0) {
    const ssize_t count =
        ::pwrite(descriptor_, next, std::min(num_bytes, kMaxBytesPerCall), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) {
      continue;
    }
    if (count < 0) {
      throw_system_error(who_, "write", temporary_, errno);
    }
    next += count;
    offset += static_cast<size_t>(count);
    num_bytes -= static_cast<size_t>(count);
  }
}

void PieceFile::copy_to(FileWriter& target, size_t offset, size_t num_bytes) const {
  std::string buffer(std::min(num_bytes, size_t{1} << 20), '\0');
  while (num_bytes > 0) {
    const ssize_t count =
        ::pread(descriptor_, buffer.data(), std::min(num_bytes, buffer.size()), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) {
      continue;
    }
    if (count <= 0) {
      throw_system_error(who_, "read", temporary_, count < 0 ? errno : EIO);
    }
    target.write(buffer.data(), static_cast<size_t>(count));
    offset += static_cast<size_t>(count);
    num_bytes -= static_cast<size_t>(count);
  }
}

void PieceFile::commit() {
  if (::fsync(descriptor_) != 0) {
    throw_system_error(who_, "write", temporary_, errno);
  }
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) {
    throw_system_error(who_, "rename the finished file to", path_, errno);
  }
  // Network file systems report a full disk here at the latest.
  if (::close(std::exchange(descriptor_, -1)) != 0) {
    throw_system_error(who_, "write", path_, errno);
  }
}

void copy_file(std::string_view who, const std::filesystem::path& from, const std::filesystem::path& to) {
  const FileDescriptor source = open_regular_file(who, from);
  FileWriter target(who, to);
  std::string buffer(size_t{1} << 20, '\0');
  while (const size_t count = read_bytes(who, source, from, buffer.data(), buffer.size())) {
    target.write(buffer.data(), count);
  }
  target.commit();
}

void sync_directory(std::string_view who, const std::filesystem::path& directory) {
  const int descriptor = ::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) {
    throw_system_error(who, "open", directory, errno);
  }
  const FileDescriptor file(descriptor);
  // Some file systems cannot sync a directory and say EINVAL; there the rename is as durable as it gets.
  if (::fsync(descriptor) != 0 && errno != EINVAL) {
    throw_system_error(who, "sync", directory, errno);
  }
}

bool is_plain_name(std::string_view name) {
  return !name.empty() && name != "." && name != ".." && name.find('/') == name.npos && name.find('\0') == name.npos;
}

}  // namespace baseq
