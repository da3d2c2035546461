#include "defaults.h"

#include <c10/util/Exception.h>

#include "io/hub_cache.h"

namespace baseq::cli {

namespace fs = std::filesystem;

fs::path installed_file(const std::string& name) {
  std::error_code error;
  const fs::path folder = fs::read_symlink("/proc/self/exe", error).parent_path();
  const fs::path installed = (folder / "../share/baseq" / name).lexically_normal();
  const fs::path built = folder / "share/baseq" / name;
  if (fs::is_regular_file(installed, error)) return installed;
  TORCH_CHECK(fs::is_regular_file(built, error), name, " is missing, which is installed with baseq; it is neither ",
              installed.string(), " nor ", built.string());
  return built;
}

std::string default_output(const std::string& model, const std::string& recipe) {
  const fs::path path(recipe);
  const std::string method = path.extension() == ".json" ? path.stem().string() : path.filename().string();
  return fs::path(model_name(model)).filename().string() + "-" + method;
}

}  // namespace baseq::cli
