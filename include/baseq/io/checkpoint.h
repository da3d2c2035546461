#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "baseq/tensor.h"

#pragma GCC visibility push(default)
namespace baseq {

/// What a file says of a tensor without its data being read.
struct TensorInfo {
  at::ScalarType dtype = at::kFloat;
  std::vector<int64_t> shape{};

  int64_t numel() const;
  int64_t nbytes() const;
};

/// A memory-mapped safetensors file. Tensors are views of the mapping and keep it alive: they outlive this object, and
/// replacing the file by rename does not change them (shortening it in place does: the process gets SIGBUS).
///
///     const SafetensorsFile file("model.safetensors");
///     for (const std::string& name : file.names()) std::cout << name << " " << file.tensor(name).sizes() << "\n";
///
/// dtypes: F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL; a file that holds any other is refused.
class SafetensorsFile {
 public:
  /// Reads the header only. Throws c10::Error with one sentence naming the file and the fault (truncated, overlapping,
  /// misdeclared, ...); no file, however damaged, makes it crash.
  explicit SafetensorsFile(const std::filesystem::path& path);
  std::vector<std::string> names() const;  ///< sorted by bytes
  bool contains(std::string_view name) const;
  TensorInfo info(std::string_view name) const;  ///< throws when the file has no such tensor
  /// The tensor, on the CPU. It is read-only: the pages are mapped without write permission, so writing to it ends the
  /// process; clone() it first. Only a tensor that the file stores unaligned is a copy.
  /// Throws naming the file when it has no such tensor, or when a BOOL holds a byte other than 0 and 1.
  Tensor tensor(std::string_view name) const;
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  /// Gives back the physical memory behind all that was read so far. Tensors stay valid: reading them again brings the
  /// pages back.
  void release_pages() const;

 private:
  struct Entry : TensorInfo {
    size_t begin, end;  ///< bytes from the start of the data section
  };
  std::filesystem::path path_;
  std::shared_ptr<const void> mapping_;  ///< keeps the file mapped
  size_t mapped_bytes_ = 0;
  const unsigned char* data_ = nullptr;
  const Entry& find(std::string_view name) const;
  std::map<std::string, Entry, std::less<>> entries_;
  std::map<std::string, std::string> metadata_;
};

/// Writes `<path>.baseq.tmp`, then renames it: a file that exists is complete, and `path` may be a file that `tensors`
/// are views of. Same tensors, same bytes: the data lies in the order of falling element size, then of name. Tensors on
/// other devices and non-contiguous ones are copied, one at a time.
/// Throws when a dtype is not one that SafetensorsFile reads, a name is not valid UTF-8 or is "__metadata__", or the
/// file cannot be written; the temporary file is then removed.
void save_safetensors(const std::filesystem::path& path, const std::map<std::string, Tensor>& tensors,
                      const std::map<std::string, std::string>& metadata = {{"format", "pt"}});

class FileWriter;

/// save_safetensors for tensors that are larger than memory: their types and shapes come first, their values in pieces.
///
///     SafetensorsWriter file("logits.safetensors", {{"logits", {at::kFloat, {tokens, vocabulary}}}});
///     for (const Tensor& rows : parts) file.append("logits", rows);
///     file.commit();
class SafetensorsWriter {
 public:
  /// Throws on what save_safetensors refuses.
  SafetensorsWriter(const std::filesystem::path& path, std::map<std::string, TensorInfo> tensors,
                    const std::map<std::string, std::string>& metadata = {{"format", "pt"}});
  ~SafetensorsWriter();  ///< before commit(): removes what it wrote
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;
  /// Names in the order in which the tensors are appended.
  const std::vector<std::string>& order() const { return order_; }
  /// The next values of a tensor, row by row. Throws when another tensor is due, when the type differs, and when there
  /// are more values than the shape says.
  void append(const std::string& name, const Tensor& values);
  /// Gives the file its name. Throws when values are missing.
  void commit();
  int64_t num_bytes() const { return num_bytes_; }  ///< written so far, header included
  uint32_t crc32() const { return crc32_; }         ///< of these bytes

 private:
  std::string where_;
  std::map<std::string, TensorInfo> infos_;
  std::vector<std::string> order_;
  std::unique_ptr<FileWriter> file_;
  void write(const void* data, size_t num_bytes);
  size_t num_complete_ = 0;   ///< tensors
  int64_t num_appended_ = 0;  ///< bytes of the next tensor that are written
  int64_t num_bytes_ = 0;
  uint32_t crc32_ = 0;
};

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
    TensorInfo info{};
    std::function<Tensor()> make{};
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
    std::string name{};
    TensorInfo info{};
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
