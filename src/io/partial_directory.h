#pragma once

#include <filesystem>
#include <optional>
#include <string_view>

#include "io/lock_file.h"

namespace baseq {

/// Where a checkpoint grows until it is whole: `<target>.partial`, which holds the directory `checkpoint` and a mark.
/// The mark says that all of it is this program's to remove, and its lock that somebody writes there now. Not
/// installed.
class PartialDirectory {
 public:
  /// Takes the lock, then removes what an earlier process left. Throws c10::Error when another process has it, or when
  /// there is something without the mark, which is not ours to remove.
  PartialDirectory(std::string_view who, const std::filesystem::path& target);
  /// Removes what is left of it.
  ~PartialDirectory();
  PartialDirectory(const PartialDirectory&) = delete;
  PartialDirectory& operator=(const PartialDirectory&) = delete;
  /// Starts empty; may be renamed.
  const std::filesystem::path& checkpoint() const { return checkpoint_; }
  /// Leaves the directory to the user: without its mark nobody removes it.
  void give_up();

  /// `<target>.partial`.
  static std::filesystem::path path_of(const std::filesystem::path& target);
  /// Throws what the constructor would throw now, and changes nothing.
  static void check(std::string_view who, const std::filesystem::path& target);

 private:
  void remove();
  std::filesystem::path path_, checkpoint_;
  std::optional<LockFile> lock_;
};

}  // namespace baseq
