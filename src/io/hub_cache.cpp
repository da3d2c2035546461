#include "io/hub_cache.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <optional>
#include <sstream>
#include <string_view>
#include <system_error>

#include "files.h"
#include "strict_json.h"

namespace baseq {
namespace {

namespace fs = std::filesystem;

constexpr const char* kHubCache = "checkpoint";
constexpr size_t kMaxRefBytes = 1024;
// The directory of "org/name" is called "models--org--name".
constexpr const char* kRepositoryPrefix = "models--";
constexpr const char* kSlash = "--";

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

/// The name of a branch or tag, as "refs/pr/1", or a commit.
bool is_revision(const std::string& text) {
  std::istringstream parts(text + "/");
  bool plain = !text.empty();
  for (std::string part; std::getline(parts, part, '/');) plain = plain && is_plain_name(part);
  return plain;
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
  const size_t at = model.find('@');
  const std::string repository = model.substr(0, at);
  const std::string revision = at == model.npos ? "main" : model.substr(at + 1);
  TORCH_CHECK(is_repository(repository) && is_revision(revision), kHubCache, ": ", model,
              " is not a directory, nor the \"org/name\" or \"org/name@revision\" of a model");
  const fs::path cache = hub_cache();
  std::string folder = kRepositoryPrefix + repository;
  if (const size_t slash = folder.find('/'); slash != folder.npos) folder.replace(slash, 1, kSlash);
  const std::string download = "hf download " + repository + (at == model.npos ? "" : " --revision " + revision);
  const fs::path snapshots = cache / folder / "snapshots";
  if (is_plain_name(revision) && fs::is_directory(snapshots / revision, error)) return snapshots / revision;
  const fs::path reference = cache / folder / "refs" / revision;
  TORCH_CHECK(fs::is_regular_file(reference, error), kHubCache, ": ", model,
              " is neither a directory nor in the cache ", cache.string(),
              " of the Hugging Face Hub; download it first, as with: ", download);
  std::string commit = read_file(kHubCache, reference, kMaxRefBytes);
  commit.erase(std::find_if(commit.begin(), commit.end(), [](unsigned char c) { return std::isspace(c) != 0; }),
               commit.end());
  TORCH_CHECK(is_plain_name(commit), kHubCache, ": ", reference.string(), " holds ", quote(commit),
              ", expected a commit");
  TORCH_CHECK(fs::is_directory(snapshots / commit, error), kHubCache, ": ", (snapshots / commit).string(),
              " does not exist though refs/", revision, " names it; download it again, as with: ", download);
  return snapshots / commit;
}

std::string model_name(const fs::path& path) {
  std::error_code error;
  const fs::path whole = fs::absolute(path, error).lexically_normal();
  const fs::path directory = whole.has_filename() ? whole : whole.parent_path();
  std::string repository = directory.parent_path().parent_path().filename().string();
  if (directory.parent_path().filename() != "snapshots" || !repository.starts_with(kRepositoryPrefix)) {
    return directory.filename().string();
  }
  repository.erase(0, std::string_view(kRepositoryPrefix).size());
  if (const size_t slash = repository.find(kSlash); slash != repository.npos) repository.replace(slash, 2, "/");
  return repository;
}

}  // namespace baseq
