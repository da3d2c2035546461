#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>

/// Files as the readers and writers of this module need them: every system error becomes a c10::Error that names the
/// path, and what is written is on the disk before it gets its final name. Not installed.
namespace baseq {

/// Throws "`who`: cannot `action` `path`: <text of the system error>".
[[noreturn]] void throw_system_error(std::string_view who, std::string_view action, const std::filesystem::path& path,
                                     int error);

/// Whether something is there (links are followed); throws when that cannot be found out.
bool path_exists(std::string_view who, const std::filesystem::path& path);

/// An open file, closed when it goes out of scope.
class FileDescriptor {
 public:
  explicit FileDescriptor(int value) : value_(value) {}
  ~FileDescriptor();
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  int get() const { return value_; }

 private:
  int value_;
};

/// Opens a regular file (links are followed) for reading; throws for anything else. A pipe does not block.
FileDescriptor open_regular_file(std::string_view who, const std::filesystem::path& path);
/// Size in bytes of an open file.
size_t size_of(std::string_view who, const FileDescriptor& file, const std::filesystem::path& path);
/// The file as memory that cannot be written to; it stays mapped as long as the result lives. `size` is not 0.
std::shared_ptr<const void> map_file(std::string_view who, const FileDescriptor& file, size_t size,
                                     const std::filesystem::path& path);
/// Reads up to `size` bytes from where the file stands; fewer only at its end.
size_t read_bytes(std::string_view who, const FileDescriptor& file, const std::filesystem::path& path, char* data,
                  size_t size);
/// The whole file; throws when it is longer than `max_bytes`.
std::string read_file(std::string_view who, const std::filesystem::path& path, size_t max_bytes);

/// Throws when `content`, the start of a file, is that of a git-lfs pointer: what a clone without git-lfs leaves in
/// place of a large file.
void refuse_lfs_pointer(std::string_view content, std::string_view where);

/// Where bytes that are written to a path end up.
struct WriteTarget {
  std::filesystem::path path;  ///< links followed
  int descriptor = -1;         ///< the open file of this process that the path names, as /dev/stdout does; -1: none
  bool regular = true;         ///< a regular file, or nothing yet; false for a pipe or a device
};

/// Follows links, also one to a file that does not exist yet. Throws for a directory and for a circle of links.
WriteTarget write_target(std::string_view who, const std::filesystem::path& path);

/// Writes a file as a whole: to `<path>.baseq.tmp` first, which commit() syncs to the disk and renames. Destroyed
/// before commit(), it removes that file. A link is followed. A pipe or a device is written through, and so is a path
/// such as /dev/stdout, where that file stands. A second writer of the same file is refused.
class FileWriter {
 public:
  FileWriter(std::string_view who, const std::filesystem::path& path);
  ~FileWriter();
  FileWriter(const FileWriter&) = delete;
  FileWriter& operator=(const FileWriter&) = delete;
  void write(const void* data, size_t num_bytes);
  void write(std::string_view text) { write(text.data(), text.size()); }
  /// The file that holds what was written so far, to look at before commit(). Empty for a pipe or a device.
  const std::filesystem::path& temporary() const { return temporary_; }
  void commit();

 private:
  void create_temporary();
  std::string who_;
  std::filesystem::path path_, temporary_;
  int descriptor_ = -1;
};

/// Writes `<path>.pieces` in any order and gives bytes of it back; commit() syncs it to the disk and renames it to
/// `path`. Destroyed before commit(), it removes it.
class PieceFile {
 public:
  PieceFile(std::string_view who, const std::filesystem::path& path);
  ~PieceFile();
  PieceFile(const PieceFile&) = delete;
  PieceFile& operator=(const PieceFile&) = delete;
  void write(const void* data, size_t num_bytes, size_t offset);
  void copy_to(FileWriter& target, size_t offset, size_t num_bytes) const;
  void commit();

 private:
  std::string who_;
  std::filesystem::path path_, temporary_;
  int descriptor_ = -1;
};

/// Copies the content of a regular file (links are followed) through a FileWriter.
void copy_file(std::string_view who, const std::filesystem::path& from, const std::filesystem::path& to);

/// Makes the renames inside `directory` durable.
void sync_directory(std::string_view who, const std::filesystem::path& directory);

/// True when `name` names a file inside a directory and nothing else: not empty, no '/', not "." or "..".
bool is_plain_name(std::string_view name);

}  // namespace baseq
