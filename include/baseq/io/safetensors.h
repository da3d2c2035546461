#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "baseq/tensor.h"

#pragma GCC visibility push(default)
namespace baseq {

/// What a file says of a tensor without its data being read.
struct TensorInfo {
  at::ScalarType dtype = at::kFloat;
  std::vector<int64_t> shape;

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

}  // namespace baseq
#pragma GCC visibility pop
