#include "io/output_file.h"

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <system_error>

#include "files.h"
#include "io/disk_room.h"

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
  for (const std::string& problem : find_disk_problems({{path, num_bytes}})) TORCH_CHECK(false, who, ": ", problem);
}

void write_output_file(const fs::path& path, std::string_view content) {
  FileWriter file("output", path);
  file.write(content);
  file.commit();
}

}  // namespace baseq
