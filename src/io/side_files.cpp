#include "io/side_files.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <system_error>

#include "checkpoint_files.h"
#include "files.h"
#include "strict_json.h"

namespace baseq {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr const char* kSideFiles = "side files";
constexpr size_t kMaxSideJsonBytes = 100'000'000;
constexpr size_t kMaxListed = 10;

constexpr const char* kOtherKind = "neither configuration, tokenizer, template, text nor picture";
constexpr const char* kLinkAway = "links that leave the checkpoint";
constexpr const char* kRedirects = "says from where to load the model";
constexpr const char* kNamesCode = "name code of others";
constexpr const char* kNoJson = "not valid JSON";
constexpr const char* kDirectory = "subdirectories";

/// Endings of what is copied. A list of what is harmless: one of what is not would never be complete.
constexpr std::string_view kEndings[] = {"",          ".bpe",   ".codes", ".csv",   ".gif", ".jinja", ".jpeg", ".jpg",
                                         ".json",     ".jsonl", ".md",    ".model", ".pdf", ".png",   ".rst",  ".spm",
                                         ".tiktoken", ".tsv",   ".txt",   ".v1",    ".v2",  ".v3",    ".v7",   ".v11",
                                         ".v13",      ".vocab", ".webp",  ".yaml",  ".yml"};

/// They name a base model, or the classes of a pipeline, that is loaded in place of the files around them.
constexpr std::string_view kRedirecting[] = {"adapter_config.json", "modules.json", "model_index.json"};

template <size_t kCount>
bool contains(const std::string_view (&names)[kCount], std::string_view name) {
  return std::find(std::begin(names), std::end(names), name) != std::end(names);
}

bool is_checkpoint_itself(const std::string& name) {
  return name == kConfigName || name.ends_with(".safetensors") || name.ends_with(".index.json");
}

std::string lower_ending(const fs::path& file) {
  std::string ending = file.extension().string();
  std::transform(ending.begin(), ending.end(), ending.begin(), [](unsigned char c) { return std::tolower(c); });
  return ending;
}

bool is_below(const fs::path& file, const fs::path& directory) {
  const fs::path relative = file.lexically_relative(directory);
  return !relative.empty() && *relative.begin() != "..";
}

/// Whether the files of `directory` may come from `target`; both are without links.
bool belongs_to(const fs::path& target, const fs::path& directory) {
  if (is_below(target, directory)) return true;
  // models--org--name/snapshots/<commit>/<file> -> models--org--name/blobs/<hash>
  const fs::path snapshots = directory.parent_path();
  return snapshots.filename() == "snapshots" && is_below(target, snapshots.parent_path() / "blobs");
}

/// How pickles (protocol 2 and later) and archives, PyTorch's among them, begin.
bool is_pickle_or_archive(const fs::path& file) {
  std::array<char, 4> begin{};
  const FileDescriptor opened = open_regular_file(kSideFiles, file);
  const size_t count = read_bytes(kSideFiles, opened, file, begin.data(), begin.size());
  const std::string_view text(begin.data(), count);
  return text.starts_with("PK\x03\x04") || (count > 1 && text[0] == '\x80' && text[1] >= 2 && text[1] <= 5);
}

bool names_code(const std::string& key, const json& value) {
  // The vocabulary of a tokenizer may have such words: their values are numbers.
  if (key == "auto_map" || key == "custom_pipelines") return !value.is_number();
  const bool implementation =
      key.find("attn_implementation") != key.npos || key.find("experts_implementation") != key.npos;
  // "sdpa" is transformers' own, "org/name" is downloaded.
  return implementation && value.dump(-1, ' ', false, json::error_handler_t::replace).find('/') != std::string::npos;
}

class Search {
 public:
  explicit Search(const fs::path& directory) : root_(fs::canonical(directory)) {}

  void look_at(const fs::path& file) {
    const std::string name = file.filename().string();
    std::error_code error;
    const fs::path target = fs::weakly_canonical(file, error);
    if (fs::is_directory(file, error)) {
      if (!name.starts_with('.')) leave_out(kDirectory, name);
      return;
    }
    if (!contains(kEndings, lower_ending(file))) return leave_out(kOtherKind, name);
    if (!belongs_to(target, root_)) return leave_out(kLinkAway, name);
    if (!fs::exists(target, error)) {
      result.problems.push_back(file.string() + ": is a link to nothing; incomplete download?");
      return;
    }
    if (!fs::is_regular_file(target, error) || is_pickle_or_archive(target)) return leave_out(kOtherKind, name);
    if (contains(kRedirecting, name)) return leave_out(kRedirects, name);
    SideFiles::File copied{
        .from = target, .name = name, .num_bytes = static_cast<int64_t>(fs::file_size(target, error))};
    // tokenizer.json is large, and the program that reads it runs no code.
    if (lower_ending(file) == ".json" && name != "tokenizer.json" && !remove_code(copied)) return;
    result.copied.push_back(std::move(copied));
  }

  /// Removes references to code and says so; false where there are none.
  bool mention_code(json& value, const std::string& name) {
    const std::vector<std::string> removed = remove_code_references(value);
    for (const std::string& key : removed) leave_out(kNamesCode, fmt::format("{}: {}", name, key));
    return !removed.empty();
  }

  SideFiles result;

 private:
  void leave_out(const char* reason, const std::string& name) { result.left_out[reason].push_back(name); }

  /// False where the file cannot be copied at all: other readers may understand what ours does not.
  bool remove_code(SideFiles::File& file) {
    json value;
    try {
      value = parse_json(read_file(kSideFiles, file.from, kMaxSideJsonBytes), file.name, DuplicateKeys::kLastWins);
    } catch (const c10::Error&) {
      leave_out(kNoJson, file.name);
      return false;
    }
    const bool changed = mention_code(value, file.name);
    if (!changed) return true;
    file.content = dump_json(value, file.name, /*indent=*/2) + "\n";
    file.num_bytes = static_cast<int64_t>(file.content.size());
    return true;
  }

  fs::path root_;
};

}  // namespace

int64_t SideFiles::num_bytes() const {
  int64_t sum = 0;
  for (const File& file : copied) sum += file.num_bytes;
  return sum;
}

std::string SideFiles::warning() const {
  std::vector<std::string> groups;
  for (const auto& [reason, names] : left_out) {
    const size_t listed = std::min(names.size(), kMaxListed);
    std::vector<std::string> quoted;
    for (size_t i = 0; i < listed; ++i) quoted.push_back(quote(names[i]));
    const std::string more = listed < names.size() ? fmt::format(" and {} more", names.size() - listed) : "";
    groups.push_back(fmt::format("{}{} ({})", fmt::join(quoted, ", "), more, reason));
  }
  return groups.empty() ? "" : fmt::format("not copied to the output: {}", fmt::join(groups, "; "));
}

SideFiles find_side_files(const fs::path& directory, const json& config, const std::set<std::string>& except) {
  std::error_code error;
  std::vector<fs::path> files;
  for (fs::directory_iterator entry(directory, error), end; !error && entry != end; entry.increment(error)) {
    files.push_back(entry->path());
  }
  if (error) throw_system_error(kSideFiles, "read", directory, error.value());
  std::sort(files.begin(), files.end());
  Search search(directory);
  json dropped = config;
  search.mention_code(dropped, kConfigName);
  for (const fs::path& file : files) {
    const std::string name = file.filename().string();
    if (!is_checkpoint_itself(name) && !except.contains(name)) search.look_at(file);
  }
  return std::move(search.result);
}

std::vector<std::string> remove_code_references(json& config) {
  std::vector<std::string> removed;
  if (!config.is_structured()) return removed;
  std::vector<std::string> keys;
  if (config.is_object()) {
    for (const auto& [key, value] : config.items()) {
      if (names_code(key, value)) keys.push_back(key);
    }
  }
  for (const std::string& key : keys) {
    config.erase(key);
    removed.push_back(key);
  }
  for (json& value : config) {
    for (std::string& key : remove_code_references(value)) {
      if (std::find(removed.begin(), removed.end(), key) == removed.end()) removed.push_back(std::move(key));
    }
  }
  return removed;
}

}  // namespace baseq
