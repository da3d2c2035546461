#pragma once

#include <map>

#include "baseq/io/checkpoint.h"
#include "files.h"

namespace baseq {

/// A safetensors file whose tensors come one at a time. Data of tensors that were announced go where they stay, behind
/// room for the header; when others come, or some do not, all are moved once it is known what there is. Not installed.
class SafetensorsStream {
 public:
  using Infos = std::map<std::string, TensorInfo>;
  /// @param expected  what will be added, as far as that is known
  SafetensorsStream(std::string who, const std::filesystem::path& path, const Infos& expected);
  bool contains(const std::string& name) const { return infos_.contains(name); }
  size_t num_bytes() const { return num_bytes_; }  ///< of all tensors so far
  /// `tensor` as storable() returns it, under a name that is new.
  void add(const std::string& name, const Tensor& tensor);
  /// Gives the file its name.
  void finish();

 private:
  std::string who_;
  std::filesystem::path path_;
  PieceFile file_;
  Infos expected_, infos_;
  std::map<std::string, size_t> planned_, offsets_;  ///< in the file: of what is expected, of what was added
  size_t end_ = 0;                                   ///< where what nobody expected goes
  size_t num_bytes_ = 0;
};

}  // namespace baseq
