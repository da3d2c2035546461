#include "gguf_file.h"

#include <ATen/ATen.h>

#include <bit>

namespace baseq {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF is written as it lies in memory");

constexpr int64_t kAlignment = 32;
constexpr uint32_t kMagic = 0x46554747;  // "GGUF"
constexpr uint32_t kGgufVersion = 3;
// Types of metadata values.
constexpr uint32_t kUint32 = 4, kInt32 = 5, kFloat32 = 6, kBool = 7, kString = 8, kArray = 9;

template <class T>
void append(std::string& bytes, const T& value) {
  bytes.append(reinterpret_cast<const char*>(&value), sizeof(T));
}

void append_string(std::string& bytes, const std::string& text) {
  append(bytes, uint64_t{text.size()});
  bytes += text;
}

}  // namespace

void GgufMetadata::key_of_type(const std::string& key, uint32_t type) {
  append_string(bytes_, key);
  append(bytes_, type);
  ++count_;
}

void GgufMetadata::add(const std::string& key, uint32_t value) {
  key_of_type(key, kUint32);
  append(bytes_, value);
}

void GgufMetadata::add(const std::string& key, float value) {
  key_of_type(key, kFloat32);
  append(bytes_, value);
}

void GgufMetadata::add(const std::string& key, bool value) {
  key_of_type(key, kBool);
  append(bytes_, static_cast<uint8_t>(value));
}

void GgufMetadata::add(const std::string& key, const std::string& value) {
  key_of_type(key, kString);
  append_string(bytes_, value);
}

void GgufMetadata::add(const std::string& key, const std::vector<std::string>& values) {
  key_of_type(key, kArray);
  append(bytes_, kString);
  append(bytes_, uint64_t{values.size()});
  for (const std::string& value : values) append_string(bytes_, value);
}

void GgufMetadata::add(const std::string& key, const std::vector<int32_t>& values) {
  key_of_type(key, kArray);
  append(bytes_, kInt32);
  append(bytes_, uint64_t{values.size()});
  for (const int32_t value : values) append(bytes_, value);
}

int64_t GgufTensorInfo::num_bytes() const { return gguf_num_bytes(type, shape); }

int64_t gguf_padded(int64_t num_bytes) { return (num_bytes + kAlignment - 1) / kAlignment * kAlignment; }

std::string gguf_header(const GgufMetadata& metadata, const std::vector<GgufTensorInfo>& tensors) {
  std::string bytes;
  append(bytes, kMagic);
  append(bytes, kGgufVersion);
  append(bytes, uint64_t{tensors.size()});
  append(bytes, metadata.count());
  bytes += metadata.bytes();
  uint64_t offset = 0;
  for (const GgufTensorInfo& tensor : tensors) {
    append_string(bytes, tensor.name);
    append(bytes, static_cast<uint32_t>(tensor.shape.size()));
    for (auto size = tensor.shape.rbegin(); size != tensor.shape.rend(); ++size) {
      append(bytes, static_cast<uint64_t>(*size));
    }
    append(bytes, static_cast<uint32_t>(tensor.type));
    append(bytes, offset);
    offset += static_cast<uint64_t>(gguf_padded(tensor.num_bytes()));
  }
  bytes.resize(static_cast<size_t>(gguf_padded(static_cast<int64_t>(bytes.size()))), '\0');
  return bytes;
}

}  // namespace baseq
