#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "baseq/tensor.h"

namespace baseq {

/// A memory-mapped safetensors file. Tensors are views of the mapping and keep it alive: they outlive this object.
/// dtypes: F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL.
class SafetensorsFile {
 public:
  /// Throws c10::Error with one sentence naming the file and the fault (truncated, overlapping, misdeclared, ...).
  explicit SafetensorsFile(const std::filesystem::path& path);
  std::vector<std::string> names() const;  ///< sorted
  bool contains(std::string_view name) const;
  Tensor tensor(std::string_view name) const;  ///< read-only view; throws naming the file when it is missing
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  struct Entry {
    at::ScalarType dtype;
    std::vector<int64_t> shape;
    size_t begin, end;  ///< bytes from the start of the data section
  };
  std::filesystem::path path_;
  std::shared_ptr<const void> mapping_;  ///< keeps the file mapped
  const unsigned char* data_ = nullptr;
  std::map<std::string, Entry, std::less<>> entries_;
  std::map<std::string, std::string> metadata_;
};

/// Writes beside `path` and renames: a file that exists is complete. Same tensors, same bytes.
void save_safetensors(const std::filesystem::path& path, const std::map<std::string, Tensor>& tensors,
                      const std::map<std::string, std::string>& metadata = {{"format", "pt"}});

}  // namespace baseq
