#include "gguf_file.h"

#include <ATen/ATen.h>

#include <bit>
#include <cstring>
#include <fstream>
#include <functional>
#include <numeric>

namespace baseq {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF is written as it lies in memory");

constexpr int64_t kAlignment = 32;
constexpr int64_t kBlock = 32;
constexpr uint32_t kMagic = 0x46554747;  // "GGUF"
constexpr uint32_t kVersion = 3;
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

/// Reads what gguf_header writes; every length is checked by the stream's state.
class Reader {
 public:
  explicit Reader(const std::filesystem::path& path) : path_(path.string()), file_(path, std::ios::binary) {}
  template <class T>
  T value() {
    T result{};
    file_.read(reinterpret_cast<char*>(&result), sizeof(T));
    check(file_.good());
    return result;
  }
  std::string text() {
    const auto size = value<uint64_t>();
    check(size < (uint64_t{1} << 32));
    std::string result(size, '\0');
    file_.read(result.data(), static_cast<std::streamsize>(size));
    check(file_.good());
    return result;
  }
  void skip_metadata_value(uint32_t type) {
    constexpr int64_t kSizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    check(type < std::size(kSizes));
    if (type == kString) {
      text();
    } else if (type == kArray) {
      const auto element = value<uint32_t>();
      const auto count = value<uint64_t>();
      for (uint64_t i = 0; i < count; ++i) skip_metadata_value(element);
    } else {
      file_.ignore(kSizes[type]);
    }
  }
  uint64_t position() { return static_cast<uint64_t>(file_.tellg()); }
  void check(bool good) const { TORCH_CHECK(good, path_, ": not a GGUF version 3 file, or cut off"); }

 private:
  std::string path_;
  std::ifstream file_;
};

/// The bytes of a float16 tensor, one more dimension of 2.
Tensor half_bytes(const Tensor& values) { return values.to(at::kHalf).contiguous().unsqueeze(-1).view(at::kByte); }

Tensor to_half_values(const Tensor& bytes) { return bytes.contiguous().view(at::kHalf).to(at::kFloat); }

}  // namespace

const char* gguf_type_name(GgufType type) {
  switch (type) {
    case GgufType::kF32:
      return "F32";
    case GgufType::kF16:
      return "F16";
    case GgufType::kQ4_0:
      return "Q4_0";
    case GgufType::kQ4_1:
      return "Q4_1";
    case GgufType::kQ8_0:
      return "Q8_0";
  }
  TORCH_CHECK(false, "GGUF type ", static_cast<uint32_t>(type), " is not supported");
}

int64_t gguf_block_size(GgufType type) { return type == GgufType::kF32 || type == GgufType::kF16 ? 1 : kBlock; }

int64_t gguf_block_bytes(GgufType type) {
  switch (type) {
    case GgufType::kF32:
      return 4;
    case GgufType::kF16:
      return 2;
    case GgufType::kQ4_0:
      return 18;
    case GgufType::kQ4_1:
      return 20;
    case GgufType::kQ8_0:
      return 34;
  }
  TORCH_CHECK(false, "GGUF type ", static_cast<uint32_t>(type), " is not supported");
}

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

int64_t GgufTensorInfo::num_bytes() const {
  const int64_t count = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
  return count / gguf_block_size(type) * gguf_block_bytes(type);
}

int64_t gguf_padded(int64_t num_bytes) { return (num_bytes + kAlignment - 1) / kAlignment * kAlignment; }

std::string gguf_header(const GgufMetadata& metadata, const std::vector<GgufTensorInfo>& tensors) {
  std::string bytes;
  append(bytes, kMagic);
  append(bytes, kVersion);
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

Tensor gguf_blocks(GgufType type, const Tensor& codes, const Tensor& scale, const Tensor& zero_point) {
  const int64_t rows = codes.size(0), blocks = codes.size(1) / kBlock;
  const auto by_block = [&](const Tensor& qparam) {  // [rows, blocks]
    return qparam.expand({rows, -1}).repeat_interleave(blocks / qparam.size(1), 1);
  };
  const Tensor grouped = codes.contiguous().view({rows, blocks, kBlock});
  const Tensor d = by_block(scale);
  std::vector<Tensor> parts = {half_bytes(d)};
  if (type == GgufType::kQ8_0) {
    parts.push_back(grouped.view(at::kByte));
  } else {
    if (type == GgufType::kQ4_1) {
      parts.push_back(half_bytes(zero_point.defined() ? -(by_block(zero_point) + 8) * d : -8 * d));
    }
    const Tensor unsigned_codes = (grouped + 8).to(at::kByte);
    const Tensor low = unsigned_codes.narrow(2, 0, 16), high = unsigned_codes.narrow(2, 16, 16);
    parts.push_back(at::bitwise_or(low, at::bitwise_left_shift(high, 4)));
  }
  return at::cat(parts, 2).view({rows, -1});
}

GgufFile::GgufFile(const std::filesystem::path& path) : path_(path) {
  Reader reader(path);
  reader.check(reader.value<uint32_t>() == kMagic && reader.value<uint32_t>() == kVersion);
  const auto num_tensors = reader.value<uint64_t>(), num_pairs = reader.value<uint64_t>();
  for (uint64_t i = 0; i < num_pairs; ++i) {
    reader.text();
    reader.skip_metadata_value(reader.value<uint32_t>());
  }
  for (uint64_t i = 0; i < num_tensors; ++i) {
    GgufTensorInfo info;
    info.name = reader.text();
    const auto dimensions = reader.value<uint32_t>();
    reader.check(dimensions <= 4);
    info.shape.resize(dimensions);
    for (auto size = info.shape.rbegin(); size != info.shape.rend(); ++size) {
      *size = static_cast<int64_t>(reader.value<uint64_t>());
    }
    info.type = static_cast<GgufType>(reader.value<uint32_t>());
    gguf_type_name(info.type);
    offsets_[info.name] = reader.value<uint64_t>();
    tensors_[info.name] = info;
  }
  const auto data = static_cast<uint64_t>(gguf_padded(static_cast<int64_t>(reader.position())));
  const uint64_t size = std::filesystem::file_size(path);
  for (auto& [name, offset] : offsets_) {
    offset += data;
    reader.check(offset + static_cast<uint64_t>(tensors_.at(name).num_bytes()) <= size);
  }
}

Tensor GgufFile::dequantized(const std::string& name) const {
  const auto it = tensors_.find(name);
  TORCH_CHECK(it != tensors_.end(), path_.string(), ": has no tensor \"", name, "\"");
  const GgufTensorInfo& info = it->second;
  const Tensor bytes = at::empty({info.num_bytes()}, at::kByte);
  std::ifstream file(path_, std::ios::binary);
  file.seekg(static_cast<std::streamoff>(offsets_.at(name)));
  file.read(reinterpret_cast<char*>(bytes.mutable_data_ptr<uint8_t>()), info.num_bytes());
  TORCH_CHECK(file.good(), path_.string(), ": \"", name, "\" cannot be read");
  if (info.type == GgufType::kF32) return bytes.view(at::kFloat).view(info.shape);
  if (info.type == GgufType::kF16) return to_half_values(bytes).view(info.shape);
  const Tensor blocks = bytes.view({-1, gguf_block_bytes(info.type)});
  const Tensor d = to_half_values(blocks.narrow(1, 0, 2));
  if (info.type == GgufType::kQ8_0) {
    return (blocks.narrow(1, 2, kBlock).contiguous().view(at::kChar).to(at::kFloat) * d).view(info.shape);
  }
  const bool has_minimum = info.type == GgufType::kQ4_1;
  const Tensor packed = blocks.narrow(1, has_minimum ? 4 : 2, 16);
  const Tensor q = at::cat({at::bitwise_and(packed, 15), at::bitwise_right_shift(packed, 4)}, 1).to(at::kFloat);
  const Tensor values = has_minimum ? q * d + to_half_values(blocks.narrow(1, 2, 2)) : (q - 8) * d;
  return values.view(info.shape);
}

}  // namespace baseq
