#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "baseq/tensor.h"

/// GGUF version 3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian. Not installed.
namespace baseq {

enum class GgufType : uint32_t { kF32 = 0, kF16 = 1, kQ4_0 = 2, kQ4_1 = 3, kQ8_0 = 8 };

const char* gguf_type_name(GgufType type);
/// Elements and bytes of a block; a float type's block is one element.
int64_t gguf_block_size(GgufType type);
int64_t gguf_block_bytes(GgufType type);

/// The key-value pairs, encoded as they are added.
class GgufMetadata {
 public:
  void add(const std::string& key, uint32_t value);
  void add(const std::string& key, float value);
  void add(const std::string& key, bool value);
  void add(const std::string& key, const std::string& value);
  void add(const std::string& key, const char* value) { add(key, std::string(value)); }
  void add(const std::string& key, const std::vector<std::string>& values);
  void add(const std::string& key, const std::vector<int32_t>& values);
  const std::string& bytes() const { return bytes_; }
  uint64_t count() const { return count_; }

 private:
  void key_of_type(const std::string& key, uint32_t type);
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

/// Everything in front of the data, padded to where the data starts.
std::string gguf_header(const GgufMetadata& metadata, const std::vector<GgufTensorInfo>& tensors);

/// Bytes from one tensor's start to the next one's.
int64_t gguf_padded(int64_t num_bytes);

/// Blocks of ggml, uint8 [rows, blocks * block bytes]. `codes` int8 [rows, columns]; `scale`, `zero_point` float32
/// [rows, groups] with groups of a multiple of 32 columns; kQ4_1 takes a zero point (undefined: 0), the others none.
Tensor gguf_blocks(GgufType type, const Tensor& codes, const Tensor& scale, const Tensor& zero_point);

/// Reads tensors of a file in the types above.
class GgufFile {
 public:
  /// Throws c10::Error when the file is not GGUF version 3 or is cut off.
  explicit GgufFile(const std::filesystem::path& path);
  const std::map<std::string, GgufTensorInfo>& tensors() const { return tensors_; }
  Tensor dequantized(const std::string& name) const;  ///< float32

 private:
  std::filesystem::path path_;
  std::map<std::string, GgufTensorInfo> tensors_;
  std::map<std::string, uint64_t> offsets_;  ///< from the start of the file
};

}  // namespace baseq
