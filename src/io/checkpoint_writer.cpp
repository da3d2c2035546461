#include <ATen/ATen.h>
#include <fmt/format.h>
#include <unistd.h>

#include <system_error>
#include <utility>

#include "baseq/io/checkpoint.h"
#include "checkpoint_files.h"
#include "files.h"
#include "io/apart.h"
#include "io/output_file.h"
#include "io/side_files.h"
#include "partial_directory.h"
#include "safetensors_layout.h"
#include "safetensors_stream.h"
#include "strict_json.h"

namespace baseq {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr const char* kCheckpointWriter = "checkpoint writer";
// In the header of every file of weights that SafetensorsStream writes.
constexpr std::string_view kWeightsMark = R"("baseq":"weights")";
constexpr const char* kMethod = "baseq";  // quant_method in config.json of what this program quantized

void check(const std::error_code& error, std::string_view action, const fs::path& path) {
  if (error) {
    throw_system_error(kCheckpointWriter, action, path, error.value());
  }
}

void rename_path(const fs::path& from, const fs::path& to) {
  std::error_code error;
  fs::rename(from, to, error);
  TORCH_CHECK(!error, kCheckpointWriter, ": cannot rename ", from.string(), " to ", to.string(), ": ", error.message());
}

// The directory itself: absolute, links resolved, no trailing slash; so its sibling is on the same file system.
fs::path resolve(const fs::path& directory) {
  TORCH_CHECK(!directory.empty(), kCheckpointWriter, ": the path of the directory is empty");
  std::error_code error;
  fs::path resolved = fs::absolute(directory, error);
  check(error, "resolve", directory);
  resolved = fs::weakly_canonical(resolved, error);
  check(error, "resolve", directory);
  if (!resolved.has_filename()) {
    resolved = resolved.parent_path();
  }
  TORCH_CHECK(resolved.has_filename(), kCheckpointWriter, ": ", directory.string(), " cannot be a checkpoint");
  TORCH_CHECK(path_exists(kCheckpointWriter, resolved) || !fs::is_symlink(fs::symlink_status(resolved, error)),
              kCheckpointWriter, ": ", resolved.string(), " is a link to nothing");
  return resolved;
}

bool is_weights_or_config(std::string_view name) {
  for (const std::string_view ending : {".safetensors", ".bin", ".pth", ".gguf", ".index.json"}) {
    if (name.ends_with(ending)) {
      return true;
    }
  }
  return name == kConfigName;
}

// The weights of a checkpoint whose config.json says that this program quantized it: builds before the mark wrote none.
std::set<std::string> weights_by_config(const fs::path& directory) {
  try {
    const Checkpoint checkpoint(directory);
    const auto quantization = checkpoint.config().find("quantization_config");
    if (quantization == checkpoint.config().end() || !quantization->is_object()) return {};
    const auto method = quantization->find("quant_method");
    if (method != quantization->end() && *method == kMethod) return checkpoint.files();
  } catch (const c10::Error&) {
    // Nothing that is damaged tells who wrote it.
  }
  return {};
}

// Throws unless the checkpoint may take the place of what `directory` is now.
void check_replaceable(const fs::path& directory, const CheckpointWriter::Options& options) {
  if (!options.source.empty()) check_apart(directory, options.source);
  if (!path_exists(kCheckpointWriter, directory)) {
    return;
  }
  std::error_code error;
  TORCH_CHECK(fs::is_directory(directory, error), directory.string(), ": exists and is not a directory");
  const bool empty = fs::is_empty(directory, error);
  check(error, "read", directory);
  if (empty) return;
  TORCH_CHECK(options.force, directory.string(), ": exists; pass `force` to replace it");
  // `force` is for an earlier result, not for somebody's home directory or original model.
  TORCH_CHECK(path_exists(kCheckpointWriter, directory / kConfigName), kCheckpointWriter, ": ", directory.string(),
              " has files but no config.json; it does not look like a checkpoint and is not replaced");
  const std::set<std::string> own_weights = weights_by_config(directory);
  for (fs::directory_iterator entry(directory, error), end; !error && entry != end; entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    const bool written = name == kConfigName || name == kIndexName || name.ends_with(".safetensors");
    const bool side_file = !is_weights_or_config(name) && !options.source.empty() && fs::exists(options.source / name);
    if (name.ends_with(".safetensors") && !own_weights.contains(name)) {
      check_output_file(kCheckpointWriter, entry->path(), kWeightsMark);
    }
    TORCH_CHECK(written || side_file || options.own_files.contains(name), directory.string(), ": holds ", name,
                ", which is no part of the checkpoint that would replace it; move it away");
  }
}

// Moves `partial` to `directory`; what was there is removed only after that.
void replace_directory(const fs::path& partial, const fs::path& directory) {
  std::error_code error;
  if (!path_exists(kCheckpointWriter, directory)) {
    rename_path(partial, directory);
    sync_directory(kCheckpointWriter, directory.parent_path());
    return;
  }
  fs::path aside;
  for (int attempt = 0; attempt == 0 || fs::exists(fs::symlink_status(aside, error)); ++attempt) {
    aside = directory;
    aside += fmt::format(".old-{}-{}", ::getpid(), attempt);
  }
  rename_path(directory, aside);
  try {
    rename_path(partial, directory);
  } catch (const c10::Error&) {
    fs::rename(aside, directory, error);
    throw;
  }
  sync_directory(kCheckpointWriter, directory.parent_path());
  fs::remove_all(aside, error);
  TORCH_CHECK(!error, kCheckpointWriter, ": ", directory.string(),
              " is complete, but the checkpoint it replaced cannot be removed from ", aside.string(), ": ",
              error.message());
}

}  // namespace

void CheckpointWriter::check_place(const fs::path& directory, const Options& options) {
  TORCH_CHECK(options.shard_bytes > 0, kCheckpointWriter, ": shard_bytes is ", options.shard_bytes,
              ", expected more than 0");
  const fs::path resolved = resolve(directory);
  check_replaceable(resolved, options);
  PartialDirectory::check(kCheckpointWriter, resolved);
}

CheckpointWriter::CheckpointWriter(const fs::path& directory, const Options& options)
    : directory_(resolve(directory)), options_(options) {
  check_place(directory, options);
  place_ = std::make_unique<PartialDirectory>(kCheckpointWriter, directory_);
  partial_ = place_->checkpoint();
}

CheckpointWriter::~CheckpointWriter() = default;

Tensor CheckpointWriter::checked(const std::string& name, const Tensor& tensor) const {
  TORCH_CHECK(!finished_, kCheckpointWriter, ": ", directory_.string(), " is finished");
  TORCH_CHECK(tensor.defined(), kCheckpointWriter, ": tensor ", quote(name), " is undefined");
  return storable(tensor, std::string(kCheckpointWriter) + ": tensor " + quote(name));
}

void CheckpointWriter::add(const std::string& name, const Tensor& tensor) {
  const Tensor data = checked(name, tensor);
  TORCH_CHECK(!shard_of_.contains(name), kCheckpointWriter, ": tensor ", quote(name), " was added before");
  if (shard_ && is_full(shard_->num_bytes(), data.nbytes())) {
    flush();
  }
  if (!shard_) {
    const auto index = static_cast<size_t>(num_shards_);
    shard_ = std::make_unique<SafetensorsStream>(kCheckpointWriter,
                                                 partial_ / fmt::format("model-{}.safetensors", ++num_shards_),
                                                 index < expected_shards_.size() ? expected_shards_[index] : Infos{});
  }
  shard_->add(name, data);
  shard_of_.emplace(name, num_shards_);
}

/// Whether a shard of `num_bytes` has no room for `more`.
bool CheckpointWriter::is_full(size_t num_bytes, size_t more) const {
  return num_bytes + more > static_cast<size_t>(options_.shard_bytes);
}

void CheckpointWriter::expect(const std::vector<Expected>& tensors) {
  TORCH_CHECK(num_shards_ == 0 && beside_.empty(), kCheckpointWriter, ": tensors were added before they were expected");
  size_t shard_bytes = 0;
  for (const Expected& tensor : tensors) {
    if (!tensor.file.empty()) {
      expected_beside_[tensor.file].emplace(tensor.name, tensor.info);
      continue;
    }
    const size_t num_bytes = stored_bytes(tensor.info);
    if (expected_shards_.empty() || is_full(shard_bytes, num_bytes)) {
      expected_shards_.emplace_back();
      shard_bytes = 0;
    }
    expected_shards_.back().emplace(tensor.name, tensor.info);
    shard_bytes += num_bytes;
  }
}

void CheckpointWriter::add_beside(const std::string& file, const std::string& name, const Tensor& tensor) {
  const Tensor data = checked(name, tensor);
  TORCH_CHECK(file.ends_with(".safetensors") && file.find('/') != std::string::npos, kCheckpointWriter, ": ",
              quote(file), " is no safetensors file of a subdirectory");
  const fs::path path = place(file);
  std::unique_ptr<SafetensorsStream>& stream = beside_[file];
  if (!stream) stream = std::make_unique<SafetensorsStream>(kCheckpointWriter, path, expected_beside_[file]);
  TORCH_CHECK(!stream->contains(name), kCheckpointWriter, ": tensor ", quote(name), " of ", file, " was added before");
  stream->add(name, data);
}

void CheckpointWriter::flush() {
  if (!shard_) {
    return;
  }
  total_bytes_ += static_cast<int64_t>(shard_->num_bytes());
  shard_->finish();
  shard_.reset();
}

void CheckpointWriter::copy_side_files(const fs::path& source, const std::set<std::string>& except) {
  TORCH_CHECK(!finished_, kCheckpointWriter, ": ", directory_.string(), " is finished");
  const SideFiles files = find_side_files(source, {}, except);
  TORCH_CHECK(files.problems.empty(), kCheckpointWriter, ": ", files.problems.front());
  for (const SideFiles::File& file : files.copied) {
    const fs::path to = partial_ / file.name;
    if (path_exists(kCheckpointWriter, to)) continue;
    if (file.content.empty()) {
      copy_file(kCheckpointWriter, file.from, to);
    } else {
      write_file(file.name, file.content);
    }
  }
}

fs::path CheckpointWriter::place(const std::string& name) {
  const size_t slash = name.find('/');
  const std::string file = slash == std::string::npos ? name : name.substr(slash + 1);
  TORCH_CHECK(is_plain_name(file) && (slash == std::string::npos || is_plain_name(name.substr(0, slash))),
              kCheckpointWriter, ": ", quote(name), " is not the plain name of a file, nor of one in a subdirectory");
  if (slash == std::string::npos) return partial_ / name;
  const fs::path subdirectory = partial_ / name.substr(0, slash);
  std::error_code error;
  fs::create_directory(subdirectory, error);
  check(error, "create", subdirectory);
  subdirectories_.insert(subdirectory);
  return subdirectory / file;
}

void CheckpointWriter::write_file(const std::string& name, std::string_view content) {
  TORCH_CHECK(!finished_, kCheckpointWriter, ": ", directory_.string(), " is finished");
  TORCH_CHECK(!is_weights_or_config(name), kCheckpointWriter, ": ", quote(name),
              " is kept for weights and config.json");
  FileWriter file(kCheckpointWriter, place(name));
  file.write(content);
  file.commit();
}

void CheckpointWriter::finish(const json& config, const std::function<void(const Checkpoint&)>& check_written) {
  TORCH_CHECK(!finished_, kCheckpointWriter, ": ", directory_.string(), " is finished");
  TORCH_CHECK(config.is_object(), kCheckpointWriter, ": the config is a JSON ", config.type_name(),
              ", expected an object");
  const auto write_json = [this](const char* name, const json& value) {
    FileWriter file(kCheckpointWriter, partial_ / name);
    file.write(dump_json(value, std::string(kCheckpointWriter) + ": " + name, /*indent=*/2) + "\n");
    file.commit();
  };
  write_json(kConfigName, config);
  flush();
  TORCH_CHECK(num_shards_ > 0, kCheckpointWriter, ": ", directory_.string(), " would have no tensors");
  const auto final_name = [this](int64_t shard) {
    return num_shards_ == 1 ? kWeightsName : fmt::format("model-{:05}-of-{:05}.safetensors", shard, num_shards_);
  };
  for (int64_t shard = 1; shard <= num_shards_; ++shard) {
    rename_path(partial_ / fmt::format("model-{}.safetensors", shard), partial_ / final_name(shard));
  }
  if (num_shards_ > 1) {
    json weight_map = json::object();
    for (const auto& [name, shard] : shard_of_) {
      weight_map[name] = final_name(shard);
    }
    write_json(kIndexName, {{"metadata", {{"total_size", total_bytes_}}}, {"weight_map", std::move(weight_map)}});
  }
  for (auto& [name, stream] : beside_) stream->finish();
  beside_.clear();  // and with it what was laid out anew
  for (const fs::path& subdirectory : subdirectories_) sync_directory(kCheckpointWriter, subdirectory);
  sync_directory(kCheckpointWriter, partial_);
  if (check_written) {
    check_written(Checkpoint(partial_));
  }
  finished_ = true;
  try {
    check_replaceable(directory_, options_);
    replace_directory(partial_, directory_);
  } catch (const c10::Error& error) {
    std::error_code ignored;
    if (!fs::exists(partial_, ignored)) throw;
    place_->give_up();
    TORCH_CHECK(false, error.what_without_backtrace(), "; the complete checkpoint is kept as ", partial_.string());
  }
  place_.reset();
}

}  // namespace baseq
