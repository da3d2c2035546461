#include "baseq/io/hub_cache.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <optional>
#include <system_error>

#include "files.h"
#include "strict_json.h"

namespace baseq {
namespace {

namespace fs = std::filesystem;

constexpr const char* kWho = "checkpoint";
constexpr size_t kMaxRefBytes = 1024;

fs::path home() {
  const char* value = std::getenv("HOME");
  return value == nullptr ? "" : value;
}

/// A path from the environment, "~" expanded; an empty variable is none.
std::optional<fs::path> environment_path(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr || *value == '\0') return std::nullopt;
  const std::string text(value);
  if (text == "~") return home();
  if (text.starts_with("~/")) return home() / text.substr(2);
  return text;
}

/// "name" or "org/name" of letters, digits, '-', '_' and '.', as the Hub allows.
bool is_repository(const std::string& text) {
  const auto is_part = [](std::string_view part) {
    const auto allowed = [](unsigned char c) { return std::isalnum(c) != 0 || c == '-' || c == '_' || c == '.'; };
    return !part.empty() && part.front() != '.' && std::all_of(part.begin(), part.end(), allowed);
  };
  const size_t slash = text.find('/');
  if (slash == text.npos) return is_part(text);
  return is_part(std::string_view(text).substr(0, slash)) && is_part(std::string_view(text).substr(slash + 1));
}

}  // namespace

fs::path hub_cache() {
  for (const char* name : {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"}) {
    if (const auto path = environment_path(name)) return *path;
  }
  if (const auto path = environment_path("HF_HOME")) return *path / "hub";
  return environment_path("XDG_CACHE_HOME").value_or(home() / ".cache") / "huggingface" / "hub";
}

fs::path resolve_checkpoint(const std::string& model) {
  std::error_code error;
  if (fs::is_directory(model, error)) return model;
  TORCH_CHECK(is_repository(model), kWho, ": ", model, " is not a directory, nor the \"org/name\" of a model");
  const fs::path cache = hub_cache();
  std::string folder = "models--" + model;
  if (const size_t slash = folder.find('/'); slash != folder.npos) folder.replace(slash, 1, "--");
  const fs::path reference = cache / folder / "refs" / "main";
  TORCH_CHECK(fs::is_regular_file(reference, error), kWho, ": ", model, " is neither a directory nor in the cache ",
              cache.string(), " of the Hugging Face Hub; download it first, as with: hf download ", model);
  std::string commit = read_file(kWho, reference, kMaxRefBytes);
  commit.erase(std::find_if(commit.begin(), commit.end(), [](unsigned char c) { return std::isspace(c) != 0; }),
               commit.end());
  TORCH_CHECK(is_plain_name(commit), kWho, ": ", reference.string(), " holds ", quote(commit), ", expected a commit");
  const fs::path snapshot = cache / folder / "snapshots" / commit;
  TORCH_CHECK(fs::is_directory(snapshot, error), kWho, ": ", snapshot.string(),
              " does not exist though refs/main names it; download it again, as with: hf download ", model);
  return snapshot;
}

}  // namespace baseq
