#include "baseq/io/checkpoint.h"

#include <ATen/ATen.h>

#include <system_error>
#include <utility>

#include "checkpoint_files.h"
#include "files.h"
#include "strict_json.h"

namespace baseq {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr const char* kCheckpoints = "checkpoint";

json read_object(const fs::path& path, DuplicateKeys duplicates) {
  json value = read_json(kCheckpoints, path, duplicates);
  TORCH_CHECK(value.is_object(), kCheckpoints, ": ", path.string(), " holds a JSON ", value.type_name(),
              ", expected an object");
  return value;
}

// The weight map of an index: tensor name -> file name.
std::map<std::string, std::string> read_weight_map(const fs::path& path) {
  const json index = read_object(path, DuplicateKeys::kRefuse);
  const auto found = index.find("weight_map");
  TORCH_CHECK(found != index.end() && found->is_object(), kCheckpoints, ": ", path.string(),
              " has no \"weight_map\" that is an object");
  std::map<std::string, std::string> weight_map;
  for (const auto& [name, file] : found->items()) {
    TORCH_CHECK(file.is_string(), kCheckpoints, ": ", path.string(), " maps ", quote(name),
                " to something that is not a file name");
    const auto& file_name = file.get_ref<const std::string&>();
    TORCH_CHECK(is_plain_name(file_name), kCheckpoints, ": ", path.string(), " maps ", quote(name), " to ",
                quote(file_name), ", expected the plain name of a file in the same directory");
    weight_map.emplace(name, file_name);
  }
  return weight_map;
}

// Collects what is missing, to name it all at once.
class MissingNames {
 public:
  void add(std::string_view name) {
    if (++count_ <= kMaxNamed) {
      names_ += (names_.empty() ? "" : ", ") + quote(name);
    }
  }
  int64_t count() const { return count_; }
  std::string text() const {
    return count_ <= kMaxNamed ? names_ : names_ + " and " + std::to_string(count_ - kMaxNamed) + " more";
  }

 private:
  static constexpr int64_t kMaxNamed = 10;
  int64_t count_ = 0;
  std::string names_;
};

[[noreturn]] void throw_no_weights(const fs::path& directory) {
  std::string pickled;  // the first by name, so that the message does not depend on the file system
  std::error_code error;
  for (fs::directory_iterator it(directory, error), end; !error && it != end; it.increment(error)) {
    const std::string name = it->path().filename().string();
    const bool is_pickle = name.ends_with(".bin") || name.ends_with(".pth") || name.ends_with(".bin.index.json");
    if (is_pickle && name != "training_args.bin" && (pickled.empty() || name < pickled)) {
      pickled = name;
    }
  }
  TORCH_CHECK(pickled.empty(), kCheckpoints, ": ", directory.string(), " has only pickled weights (", quote(pickled),
              "); load them with transformers and write safetensors with save_pretrained");
  TORCH_CHECK(false, kCheckpoints, ": ", directory.string(), " has neither ", kWeightsName, " nor ", kIndexName,
              "; incomplete download?");
}

}  // namespace

Checkpoint::Checkpoint(const fs::path& directory) : path_(directory) {
  std::error_code error;
  TORCH_CHECK(fs::is_directory(path_, error), kCheckpoints, ": ", path_.string(), " is not a directory");
  TORCH_CHECK(path_exists(kCheckpoints, path_ / kConfigName), kCheckpoints, ": ", path_.string(), " has no ",
              kConfigName, "; is it a Hugging Face checkpoint?");
  config_ = read_object(path_ / kConfigName, DuplicateKeys::kLastWins);
  file_names_.insert(kConfigName);

  const auto open = [this](const std::string& file_name) {
    file_names_.insert(file_name);
    const fs::path path = path_ / file_name;
    auto file = std::make_shared<SafetensorsFile>(path);
    std::error_code size_error;
    const auto size = fs::file_size(path, size_error);
    TORCH_CHECK(!size_error, kCheckpoints, ": cannot inspect ", path.string(), ": ", size_error.message());
    num_bytes_ += static_cast<int64_t>(size);
    return file;
  };
  if (path_exists(kCheckpoints, path_ / kWeightsName)) {
    const auto file = open(kWeightsName);
    for (std::string& name : file->names()) {
      files_.emplace(std::move(name), file);
    }
    return;
  }
  const fs::path index = path_ / kIndexName;
  if (!path_exists(kCheckpoints, index)) {
    throw_no_weights(path_);
  }
  const std::map<std::string, std::string> weight_map = read_weight_map(index);
  file_names_.insert(kIndexName);

  std::map<std::string, std::shared_ptr<SafetensorsFile>> shards;
  for (const auto& [name, file_name] : weight_map) {
    shards.emplace(file_name, nullptr);
  }
  MissingNames missing_files;
  for (const auto& [file_name, file] : shards) {
    if (!path_exists(kCheckpoints, path_ / file_name)) {
      missing_files.add(file_name);
    }
  }
  TORCH_CHECK(missing_files.count() == 0, kCheckpoints, ": ", path_.string(), " lacks ", missing_files.count(), " of ",
              shards.size(), " files that its index names: ", missing_files.text(), "; incomplete download?");
  for (auto& [file_name, file] : shards) {
    file = open(file_name);
  }
  MissingNames missing_tensors;
  for (const auto& [name, file_name] : weight_map) {
    const auto& file = shards.at(file_name);
    if (file->contains(name)) {
      files_.emplace(name, file);
    } else {
      missing_tensors.add(name);
    }
  }
  TORCH_CHECK(missing_tensors.count() == 0, kCheckpoints, ": ", path_.string(), " lacks ", missing_tensors.count(),
              " of ", weight_map.size(), " tensors that its index names: ", missing_tensors.text(),
              "; do the index and the files belong together?");
}

Checkpoint::Checkpoint(const fs::path& path, json config, MadeTensors tensors, int64_t num_bytes)
    : path_(path), config_(std::move(config)), made_(std::move(tensors)), num_bytes_(num_bytes) {}

fs::path Checkpoint::directory() const {
  std::error_code error;
  if (fs::is_directory(path_, error)) return path_;
  return path_.has_parent_path() ? path_.parent_path() : fs::path(".");
}

std::vector<std::string> Checkpoint::names() const {
  std::vector<std::string> names;
  names.reserve(files_.size());
  for (const auto& [name, file] : files_) {
    names.push_back(name);
  }
  for (const auto& [name, made] : made_) {  // a checkpoint has one of the two
    names.push_back(name);
  }
  return names;
}

bool Checkpoint::contains(std::string_view name) const {
  return files_.find(name) != files_.end() || made_.find(name) != made_.end();
}

const SafetensorsFile& Checkpoint::file_of(std::string_view name) const {
  const auto found = files_.find(name);
  TORCH_CHECK(found != files_.end(), kCheckpoints, ": ", path_.string(), " has no tensor ", quote(name));
  return *found->second;
}

Tensor Checkpoint::tensor(std::string_view name) const {
  const auto made = made_.find(name);
  if (made == made_.end()) return file_of(name).tensor(name);
  const auto& [info, make] = made->second;
  const Tensor tensor = make();
  TORCH_INTERNAL_ASSERT(tensor.scalar_type() == info.dtype && tensor.sizes() == info.shape, kCheckpoints, ": ",
                        path_.string(), ": ", quote(name), " was announced as ", info.dtype, " ",
                        at::IntArrayRef(info.shape), " but is ", tensor.scalar_type(), " ", tensor.sizes());
  return tensor;
}

TensorInfo Checkpoint::info(std::string_view name) const {
  const auto made = made_.find(name);
  return made != made_.end() ? made->second.info : file_of(name).info(name);
}

void Checkpoint::release_pages() const {
  const SafetensorsFile* last = nullptr;  // neighbours by name mostly share a file; once more does no harm
  for (const auto& [name, file] : files_) {
    if (file.get() != last) file->release_pages();
    last = file.get();
  }
}

}  // namespace baseq
