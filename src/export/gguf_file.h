#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "baseq/quant/gguf_blocks.h"

/// GGUF version 3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian. Not installed.
namespace baseq {

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

}  // namespace baseq
