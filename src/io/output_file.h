#pragma once

#include <cstdint>
#include <filesystem>
#include <string_view>

/// Files that a program writes for its user. Check them before the work, so that no result is lost to a mistyped path:
///   check_output_file("--output", "page.html", kMark);
///   ... hours ...
///   write_output_file("page.html", page);
namespace baseq {

/// Throws c10::Error "`who`: ..." unless a file can be written at `path`: its directory exists and is writable, and a
/// file in its place is empty or holds `mark` within its first 512 bytes, which tells that this program wrote it. A
/// pipe or a device passes if it can be written to, and so does an open file such as /dev/stdout.
void check_output_file(std::string_view who, const std::filesystem::path& path, std::string_view mark);

/// Whether both paths, links followed, name one regular file or one open file of this process.
bool same_output_file(const std::filesystem::path& a, const std::filesystem::path& b);

/// Throws c10::Error "`who`: ..." when the disk that `path` will be on has fewer than `num_bytes` bytes free. Parents
/// of `path` need not exist yet.
void check_disk_space(std::string_view who, const std::filesystem::path& path, int64_t num_bytes);

/// Writes the file as a whole or not at all; writes through a pipe or a device and follows a link.
void write_output_file(const std::filesystem::path& path, std::string_view content);

}  // namespace baseq
