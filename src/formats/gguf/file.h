#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "baseq/tensor.h"
#include "formats/gguf/blocks.h"

/// GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian. Not installed.

namespace baseq {

/// A memory-mapped file of version 2 or 3. It knows where tensors begin; how many bytes they take follows from their
/// types, see blocks.h.
class GgufFile {
 public:
  struct Entry {
    uint32_t type;               ///< ggml's number of the type
    std::vector<int64_t> shape;  ///< rows first, as in PyTorch; the number of elements fits in 62 bits
    uint64_t offset;             ///< from the start of the file, inside it
  };
  /// Reads the header. Throws c10::Error with one sentence naming the file and the fault; no file, however damaged,
  /// makes it crash or take more memory than a small multiple of the header's size.
  explicit GgufFile(const std::filesystem::path& path);
  /// The same of `size` bytes in memory; `name` is what messages call them.
  GgufFile(std::shared_ptr<const void> bytes, size_t size, std::string name);

  /// The key-value pairs as one object: numbers, booleans, strings, arrays.
  const nlohmann::json& metadata() const { return metadata_; }
  const std::map<std::string, Entry, std::less<>>& tensors() const { return tensors_; }
  /// The first `num_bytes` bytes of a tensor, uint8, a read-only view of the mapping. Throws when there is no such
  /// tensor or the file ends before.
  Tensor bytes(std::string_view name, int64_t num_bytes) const;
  /// Gives back the physical memory behind all that was read of a mapped file, see SafetensorsFile::release_pages.
  void release_pages() const;
  int64_t num_bytes() const { return static_cast<int64_t>(size_); }  ///< of the file
  const std::string& name() const { return name_; }

 private:
  void read_header();
  std::shared_ptr<const void> bytes_;
  bool mapped_ = false;
  size_t size_ = 0;
  std::string name_;
  nlohmann::json metadata_ = nlohmann::json::object();
  std::map<std::string, Entry, std::less<>> tensors_;
};

/// The values that a tensor of a file stands for, in gguf_values_dtype of its type.
Tensor gguf_values(const GgufFile& file, const std::string& name);

/// The key-value pairs of a file to write, encoded as they are added.
class GgufMetadata {
 public:
  using Value = std::variant<uint32_t, float, bool, std::string, std::vector<std::string>, std::vector<int32_t>>;
  void add(const std::string& key, const Value& value);
  const std::string& bytes() const { return bytes_; }
  uint64_t count() const { return count_; }

 private:
  std::string bytes_;
  uint64_t count_ = 0;
};

/// Name, type and shape (rows first, as in PyTorch) of a tensor.
struct GgufTensorInfo {
  std::string name;
  GgufType type;
  std::vector<int64_t> shape;
  int64_t num_bytes() const;
};

/// Everything in front of the data of a version 3 file, padded to where the data starts.
std::string gguf_header(const GgufMetadata& metadata, const std::vector<GgufTensorInfo>& tensors);

/// Bytes from one tensor's start to the next one's.
int64_t gguf_padded(int64_t num_bytes);

}  // namespace baseq
