#include "io/apart.h"

#include <c10/util/Exception.h>

#include <system_error>

namespace baseq {
namespace {

namespace fs = std::filesystem;

/// Absolute and without links as far as it exists.
fs::path resolved(const fs::path& path) {
  std::error_code error;
  const fs::path absolute = fs::absolute(path, error);
  fs::path result = fs::weakly_canonical(absolute, error);
  if (error) result = absolute.lexically_normal();
  return result.has_filename() ? result : result.parent_path();
}

}  // namespace

bool lies_in(const fs::path& inner, const fs::path& outer) {
  const fs::path end = resolved(outer);
  std::error_code error;
  for (fs::path path = resolved(inner);; path = path.parent_path()) {
    // Names differ where a directory is mounted twice.
    if (path == end || fs::equivalent(path, end, error)) return true;
    if (!path.has_relative_path()) return false;
  }
}

void check_apart(const fs::path& output, const fs::path& model) {
  const bool within = lies_in(output, model), holds = lies_in(model, output);
  constexpr const char* kAdvice = "; choose another output";
  TORCH_CHECK(!within || !holds, output.string(), ": is the model itself", kAdvice);
  TORCH_CHECK(!within, output.string(), ": lies in the model ", model.string(), kAdvice);
  TORCH_CHECK(!holds, output.string(), ": holds the model ", model.string(), kAdvice);
  std::error_code error;
  for (fs::directory_iterator entry(model, error), end; !error && entry != end; entry.increment(error)) {
    std::error_code ignored;
    TORCH_CHECK(!entry->is_symlink(ignored) || !lies_in(entry->path(), output), output.string(), ": holds ",
                fs::weakly_canonical(entry->path(), ignored).string(), ", which is ", entry->path().string(),
                " of the model", kAdvice);
  }
}

}  // namespace baseq
