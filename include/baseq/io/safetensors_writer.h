#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "baseq/tensor.h"

namespace baseq {

/// Writes a safetensors file tensor by tensor: whatever its size, one tensor is in memory. The header in front of the
/// data needs all of them, so the data waits in a file without a name beside `path`, and the disk holds it twice for
/// the time of commit(). The bytes are those of save_safetensors.
class SafetensorsWriter {
 public:
  explicit SafetensorsWriter(const std::filesystem::path& path,
                             const std::map<std::string, std::string>& metadata = {{"format", "pt"}});
  ~SafetensorsWriter();
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;
  /// Writes the data at once. Throws c10::Error on what save_safetensors refuses, and on a name that was added before.
  void add(const std::string& name, const Tensor& tensor);
  int64_t num_bytes() const { return num_bytes_; }  ///< of the tensors so far
  /// Writes `<path>.tmp`, syncs it to the disk and renames it. Destroyed before that, nothing is left.
  void commit();

 private:
  struct Entry {
    const char* dtype;
    size_t element_size;
    std::vector<int64_t> shape;
    int64_t begin, num_bytes;  ///< in the waiting file
  };
  std::filesystem::path path_;
  std::map<std::string, std::string> metadata_;
  std::map<std::string, Entry> entries_;
  int64_t num_bytes_ = 0;
  int descriptor_ = -1;
};

}  // namespace baseq
