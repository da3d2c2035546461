#include "partial_directory.h"

#include <c10/util/Exception.h>

#include <string>
#include <system_error>

#include "files.h"

namespace baseq {
namespace {

namespace fs = std::filesystem;

constexpr const char* kMark = ".baseq-partial";
constexpr const char* kCheckpoint = "checkpoint";

std::string held(const fs::path& path) {
  return "another process writes to " + path.string() + "; wait for it, or choose another output";
}

void expect(const std::error_code& error, std::string_view who, std::string_view action, const fs::path& path) {
  if (error) throw_system_error(who, action, path, error.value());
}

}  // namespace

fs::path PartialDirectory::path_of(const fs::path& target) {
  fs::path path = target;
  path += ".partial";
  return path;
}

void PartialDirectory::check(std::string_view who, const fs::path& target) {
  const fs::path path = path_of(target);
  std::error_code error;
  const fs::file_status status = fs::symlink_status(path, error);
  if (!fs::exists(status)) return;
  TORCH_CHECK(fs::is_directory(status), who, ": ", path.string(), " is needed for writing but is not a directory");
  const bool empty = fs::is_empty(path, error);
  expect(error, who, "read", path);
  // In this order: another process may just be making it.
  TORCH_CHECK(empty || fs::exists(fs::symlink_status(path / kMark, error)), who, ": ", path.string(),
              " is needed for writing but holds files that no unfinished run left; move it away");
  TORCH_CHECK(!LockFile::is_held(path / kMark), who, ": ", held(path));
}

PartialDirectory::PartialDirectory(std::string_view who, const fs::path& target)
    : path_(path_of(target)), checkpoint_(path_ / kCheckpoint) {
  check(who, target);
  std::error_code error;
  fs::create_directories(path_, error);
  expect(error, who, "create", path_);
  lock_.emplace(who, path_ / kMark, held(path_));
  try {
    fs::remove_all(checkpoint_, error);
    expect(error, who, "remove", checkpoint_);
    fs::create_directory(checkpoint_, error);
    expect(error, who, "create", checkpoint_);
  } catch (...) {
    remove();
    throw;
  }
}

PartialDirectory::~PartialDirectory() { remove(); }

void PartialDirectory::remove() {
  if (!lock_) return;
  std::error_code ignored;
  fs::remove_all(checkpoint_, ignored);
  lock_->remove();
  fs::remove(path_, ignored);  // fails where somebody put files of his own, or the next process its mark
}

void PartialDirectory::give_up() {
  lock_->remove();
  lock_.reset();
}

}  // namespace baseq
