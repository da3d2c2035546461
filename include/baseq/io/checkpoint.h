#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "baseq/io/safetensors.h"

#pragma GCC visibility push(default)
namespace baseq {

/// A Hugging Face checkpoint directory: config.json and model.safetensors, or (when there is no such file) shards with
/// model.safetensors.index.json, whose names count: a tensor that only a shard knows of is not there.
/// Constructing it reads config.json, the index and the headers of the weight files; tensors are mapped, not read.
///
///     const Checkpoint checkpoint("SmolLM2-135M-Instruct");
///     const Tensor embedding = checkpoint.tensor("model.embed_tokens.weight").to(at::kFloat);
///
/// open_model() opens checkpoints of other tools as well.
class Checkpoint {
 public:
  /// Throws c10::Error naming what is missing or wrong (no config.json, pickled .bin weights, shards or tensors that
  /// the index names but the directory lacks, a shard name that leaves the directory, ...).
  explicit Checkpoint(const std::filesystem::path& directory);
  /// A tensor that is made from another format each time it is asked for; `info` says what `make` returns.
  struct MadeTensor {
    TensorInfo info;
    std::function<Tensor()> make;
  };
  using MadeTensors = std::map<std::string, MadeTensor, std::less<>>;
  /// What a file or directory in another format holds, under the names of a checkpoint in this one.
  Checkpoint(const std::filesystem::path& path, nlohmann::json config, MadeTensors tensors, int64_t num_bytes);
  /// The directory, or the file of a format that is one.
  const std::filesystem::path& path() const { return path_; }
  /// Where the side files are: path(), or the directory of that file.
  std::filesystem::path directory() const;
  const nlohmann::json& config() const { return config_; }
  std::vector<std::string> names() const;  ///< sorted by bytes
  bool contains(std::string_view name) const;
  Tensor tensor(std::string_view name) const;    ///< read-only, see SafetensorsFile::tensor; throws when it is missing
  TensorInfo info(std::string_view name) const;  ///< without reading or making the tensor; throws when it is missing
  void release_pages() const;                    ///< of all files, see SafetensorsFile::release_pages
  int64_t num_bytes() const { return num_bytes_; }  ///< size of all weight files
  /// The files of the directory that were opened: config.json, the index if it counts, the weight files. Other files
  /// have no influence on the tensors. Empty for a checkpoint in another format.
  const std::set<std::string>& files() const { return file_names_; }

 private:
  const SafetensorsFile& file_of(std::string_view name) const;
  std::filesystem::path path_;
  nlohmann::json config_;
  std::map<std::string, std::shared_ptr<SafetensorsFile>, std::less<>> files_;  ///< tensor name -> its file
  std::set<std::string> file_names_;
  MadeTensors made_;  ///< those of another format
  int64_t num_bytes_ = 0;
};

class PartialDirectory;
class SafetensorsStream;

/// Writes a checkpoint directory shard by shard; nothing of a tensor stays in memory. Everything goes to a sibling
/// directory `<directory>.partial`, from which finish() renames it: a directory that exists is complete. Destroyed
/// before finish(), it removes what it wrote. One writer at a time for a directory, in whatever process: the sibling is
/// locked, and marked, so that what an earlier run left is removed and what somebody else put there is not.
///
///     CheckpointWriter writer("out", {.force = true, .source = checkpoint.path()});
///     for (const std::string& name : checkpoint.names()) writer.add(name, checkpoint.tensor(name).to(at::kHalf));
///     writer.copy_side_files(checkpoint.path());
///     writer.finish(checkpoint.config());
///
class CheckpointWriter {
 public:
  struct Options {
    /// The 5 GB of transformers. Only a shard of a single tensor may hold more.
    int64_t shard_bytes = 5'000'000'000;
    bool force = false;  ///< replace an existing checkpoint (in finish())
    /// The model that the checkpoint is made of, a directory or a file: never replaced, even with `force`. May be
    /// empty.
    std::filesystem::path source{};
    /// Names of files and directories that such a checkpoint has besides weights, config.json and what the source has.
    /// `force` removes nothing else.
    std::set<std::string> own_files{};
  };
  /// `directory` may end in a slash or be a link to a directory; its parents are created.
  /// Throws when `directory` exists and `force` is false, and even with `force` when it is not a directory, has files
  /// but no config.json, or holds files that are no part of such a checkpoint; when it is the source, holds it or lies
  /// in it; when another process writes to it; when `<directory>.partial` holds what no writer left.
  CheckpointWriter(const std::filesystem::path& directory, const Options& options);
  /// Throws what the constructor would throw now, and changes nothing.
  static void check_place(const std::filesystem::path& directory, const Options& options);
  ~CheckpointWriter();
  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;
  /// A tensor that add() (`file` is empty) or add_beside() will be given.
  struct Expected {
    std::string name;
    TensorInfo info;
    std::string file{};
  };
  /// What will be added, in this order, to be called before any of it: a file whose tensors are all known goes to the
  /// disk once. One that turns out otherwise is written a second time when it is complete. The bytes are the same.
  void expect(const std::vector<Expected>& tensors);
  /// Writes the tensor's data at once; it gets its name in the shard when that is complete. Throws on a duplicate name
  /// and, at the latest when the shard is written, on what save_safetensors refuses.
  void add(const std::string& name, const Tensor& tensor);
  /// Copies the side files of `source`, see SideFiles: byte for byte but for JSON files that name code, which are
  /// written without what names it. A file that write_file() wrote stays, and names in `except` are left out. Throws on
  /// a link to nothing.
  void copy_side_files(const std::filesystem::path& source, const std::set<std::string>& except = {});
  /// Adds the tensor to a safetensors file of a subdirectory, "directory/file.safetensors", that is no part of the
  /// checkpoint itself. Throws as add() does.
  void add_beside(const std::string& file, const std::string& name, const Tensor& tensor);
  /// Writes `name`, replacing what is there. Throws unless it is a plain file name that copy_side_files would copy, or
  /// "directory/file" of plain names.
  void write_file(const std::string& name, std::string_view content);
  /// Writes the last shard, the index (when there is more than one shard) and config.json, hands what was written to
  /// `check_written`, then renames. When that throws, nothing gets the final name.
  /// Throws when there are no tensors. When only the last rename fails, the message says where the checkpoint is kept.
  void finish(const nlohmann::json& config, const std::function<void(const Checkpoint&)>& check_written = {});

 private:
  using Infos = std::map<std::string, TensorInfo>;
  bool is_full(size_t num_bytes, size_t more) const;
  void flush();
  Tensor checked(const std::string& name, const Tensor& tensor) const;
  std::filesystem::path place(const std::string& name);  ///< of a file beside the weights; makes its subdirectory
  std::filesystem::path directory_;
  Options options_;
  std::unique_ptr<PartialDirectory> place_;
  std::filesystem::path partial_;  ///< where the files are until finish()
  std::vector<Infos> expected_shards_;
  std::map<std::string, Infos> expected_beside_;
  std::unique_ptr<SafetensorsStream> shard_;  ///< the current one; null before its first tensor
  std::map<std::string, std::unique_ptr<SafetensorsStream>> beside_;
  std::set<std::filesystem::path> subdirectories_;
  std::map<std::string, int64_t> shard_of_;  ///< tensor name -> number of its shard, from 1
  int64_t total_bytes_ = 0, num_shards_ = 0;
  bool finished_ = false;
};

}  // namespace baseq
#pragma GCC visibility pop
