#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "baseq/io/checkpoint.h"

/// How safetensors files are laid out, for those who write them piece by piece. Not installed.
namespace baseq {

struct StoredLayout {
  std::string header;              ///< with its length in front
  std::vector<std::string> order;  ///< names in the order of their data: falling element size, then name
};

/// Throws on what save_safetensors refuses; messages begin with `where`.
StoredLayout safetensors_layout(const std::map<std::string, TensorInfo>& tensors,
                                const std::map<std::string, std::string>& metadata, const std::string& where);

/// What is known of a file by the time that it is written.
struct StoredFile {
  int64_t num_bytes = 0;
  uint32_t crc32 = 0;
};

/// save_safetensors, and what it wrote.
StoredFile write_safetensors(const std::filesystem::path& path, const std::map<std::string, Tensor>& tensors,
                             const std::map<std::string, std::string>& metadata);

/// Bytes of the data of a tensor.
size_t stored_bytes(const TensorInfo& info);

/// The tensor as its data is written: on the CPU, contiguous. Throws, beginning with `what`, when it is not dense.
Tensor storable(const Tensor& tensor, const std::string& what);

}  // namespace baseq
