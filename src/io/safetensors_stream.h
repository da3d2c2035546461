#pragma once

#include <map>

#include "baseq/io/safetensors.h"
#include "files.h"

namespace baseq {

/// A safetensors file whose tensors come one at a time: their data goes to a file without a name, for the header, which
/// comes first, names them all. Not installed.
class SafetensorsStream {
 public:
  /// `directory` is where the data waits.
  SafetensorsStream(std::string who, const std::filesystem::path& directory) : who_(who), scratch_(who, directory) {}
  bool contains(const std::string& name) const { return infos_.contains(name); }
  bool empty() const { return infos_.empty(); }
  size_t num_bytes() const { return scratch_.size(); }
  /// `tensor` as storable() returns it, under a name that is new.
  void add(const std::string& name, const Tensor& tensor);
  /// Writes the file through a FileWriter and forgets the tensors.
  void write(const std::filesystem::path& path);

 private:
  std::string who_;
  ScratchFile scratch_;
  std::map<std::string, TensorInfo> infos_;
  std::map<std::string, size_t> offsets_;  ///< in scratch_
};

}  // namespace baseq
