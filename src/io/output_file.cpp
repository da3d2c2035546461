#include "baseq/io/output_file.h"

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <system_error>

#include "baseq/io/units.h"
#include "files.h"

namespace baseq {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMarkBytes = 512;

bool has_mark(std::string_view who, const fs::path& path, std::string_view mark) {
  const FileDescriptor file = open_regular_file(who, path);
  std::string start(kMarkBytes, '\0');
  start.resize(read_bytes(who, file, path, start.data(), start.size()));
  return start.empty() || start.find(mark) != start.npos;
}

}  // namespace

void check_output_file(std::string_view who, const fs::path& path, std::string_view mark) {
  const WriteTarget target = write_target(who, path);
  if (target.descriptor >= 0) {
    const int flags = ::fcntl(target.descriptor, F_GETFL);
    if (flags < 0 || (flags & O_ACCMODE) == O_RDONLY) throw_system_error(who, "write", path, EBADF);
    return;
  }
  if (!target.regular) {
    if (::access(target.path.c_str(), W_OK) != 0) throw_system_error(who, "write", path, errno);
    return;
  }
  const fs::path directory = target.path.has_parent_path() ? target.path.parent_path() / "." : ".";
  if (::access(directory.c_str(), W_OK | X_OK) != 0) throw_system_error(who, "write", path, errno);
  TORCH_CHECK(!path_exists(who, target.path) || has_mark(who, target.path, mark), who, ": ", path.string(),
              " exists and is not a result that baseq wrote; choose another name, or remove it first");
}

bool same_output_file(const fs::path& a, const fs::path& b) {
  const WriteTarget first = write_target("output", a), second = write_target("output", b);
  if (first.descriptor >= 0 || second.descriptor >= 0) return first.descriptor == second.descriptor;
  std::error_code error;
  return first.regular && fs::weakly_canonical(first.path, error) == fs::weakly_canonical(second.path, error);
}

void check_disk_space(std::string_view who, const fs::path& path, int64_t num_bytes) {
  std::error_code error;
  fs::path directory = fs::absolute(path, error);
  while (!fs::is_directory(directory, error) && directory.has_relative_path()) directory = directory.parent_path();
  struct statvfs room {};
  if (::statvfs(directory.c_str(), &room) != 0) return;  // what is wrong with it shows when it is written to
  const auto available = static_cast<int64_t>(room.f_bavail) * static_cast<int64_t>(room.f_frsize);
  TORCH_CHECK(num_bytes <= available, who, ": ", directory.string(), ": ", format_bytes(num_bytes),
              " will be written but ", format_bytes(available), " are free");
}

void write_output_file(const fs::path& path, std::string_view content) {
  FileWriter file("output", path);
  file.write(content);
  file.commit();
}

}  // namespace baseq
