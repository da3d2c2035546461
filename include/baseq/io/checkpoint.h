#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include "baseq/io/safetensors.h"

namespace baseq {

/// A Hugging Face checkpoint directory: config.json and model.safetensors, or shards with
/// model.safetensors.index.json. Nothing is read until it is asked for.
class Checkpoint {
 public:
  /// Throws c10::Error naming what is missing or wrong (no config.json, pickled .bin weights, a shard that the index
  /// names but the directory lacks, a shard name that leaves the directory, ...).
  explicit Checkpoint(const std::filesystem::path& directory);
  const std::filesystem::path& path() const { return path_; }
  const nlohmann::json& config() const { return config_; }
  std::vector<std::string> names() const;
  bool contains(std::string_view name) const;
  Tensor tensor(std::string_view name) const;
  int64_t num_bytes() const;  ///< size of all weight files

 private:
  std::filesystem::path path_;
  nlohmann::json config_;
  std::map<std::string, std::shared_ptr<SafetensorsFile>, std::less<>> files_;  ///< tensor name -> its file
};

/// Writes a checkpoint directory shard by shard. Everything goes to a sibling directory `<directory>.partial`, which
/// finish() renames: a directory that exists is complete. Destroyed before finish(), it removes what it wrote.
class CheckpointWriter {
 public:
  struct Options {
    int64_t shard_bytes = int64_t{1} << 30;  ///< a shard is written once this much is buffered
    bool force = false;                      ///< replace an existing directory (in finish())
  };
  /// Throws when `directory` exists and `force` is false.
  CheckpointWriter(const std::filesystem::path& directory, const Options& options);
  ~CheckpointWriter();
  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;
  void add(const std::string& name, const Tensor& tensor);  ///< throws on a duplicate name
  /// Copies every regular file of `source` that is neither weights (*.safetensors, *.bin, *.pth, *.gguf, *.index.json)
  /// nor config.json, byte for byte.
  void copy_side_files(const std::filesystem::path& source);
  void write_file(const std::string& name, std::string_view content);
  /// Writes the last shard, the index (when there is more than one shard) and config.json, then renames.
  void finish(const nlohmann::json& config);

 private:
  void flush();
  std::filesystem::path directory_, partial_;
  Options options_;
  std::map<std::string, Tensor> buffer_;
  int64_t buffered_bytes_ = 0, total_bytes_ = 0;
  std::vector<std::vector<std::string>> shards_;  ///< names of the tensors of each written shard
  bool finished_ = false;
};

}  // namespace baseq
