#include "formats/gguf/file.h"

#include <ATen/ATen.h>
#include <sys/mman.h>

#include <bit>
#include <cstring>
#include <type_traits>

#include "io/files.h"
#include "io/strict_json.h"

static_assert(std::endian::native == std::endian::little, "GGUF data is little-endian and is not converted");

namespace baseq {
namespace {

using nlohmann::json;

constexpr const char* kGguf = "gguf";
constexpr uint32_t kMagic = 0x46554747;  // "GGUF"
constexpr uint32_t kWrittenVersion = 3;
constexpr int64_t kAlignment = 32;  ///< unless general.alignment says otherwise
constexpr uint64_t kMaxAlignment = 1 << 20;
constexpr uint32_t kMaxDimensions = 4;
constexpr int kMaxNesting = 4;       // of arrays
constexpr size_t kEntryBytes = 200;  // of a tensor in memory beside its name, rounded up

enum ValueType : uint32_t {
  kUint8,
  kInt8,
  kUint16,
  kInt16,
  kUint32,
  kInt32,
  kFloat32,
  kBool,
  kString,
  kArray,
  kUint64,
  kInt64,
  kFloat64
};

/// Reads values from memory; what lies past its end is an error, and so are values that take more than JsonBudget
/// allows: a byte of an array becomes sixteen.
class Cursor {
 public:
  Cursor(const unsigned char* begin, size_t size, const std::string& name)
      : begin_(begin),
        size_(size),
        name_(name),
        where_(std::string(kGguf) + ": the header of " + name),
        budget_(where_) {}
  size_t position() const { return position_; }
  size_t left() const { return size_ - position_; }

  template <class T>
  T value() {
    need(sizeof(T));
    T result;
    std::memcpy(&result, begin_ + position_, sizeof(T));
    position_ += sizeof(T);
    return result;
  }
  JsonBudget& budget() { return budget_; }
  std::string text() {
    const auto size = value<uint64_t>();
    need(size);
    budget_.add_text(size);
    std::string result(reinterpret_cast<const char*>(begin_ + position_), size);
    position_ += size;
    return result;
  }
  json metadata_value(uint32_t type, int depth = 0) {
    switch (type) {
      case kUint8:
        return value<uint8_t>();
      case kInt8:
        return value<int8_t>();
      case kUint16:
        return value<uint16_t>();
      case kInt16:
        return value<int16_t>();
      case kUint32:
        return value<uint32_t>();
      case kInt32:
        return value<int32_t>();
      case kFloat32:
        return value<float>();
      case kBool:
        return value<uint8_t>() != 0;
      case kString:
        return text();
      case kUint64:
        return value<uint64_t>();
      case kInt64:
        return value<int64_t>();
      case kFloat64:
        return value<double>();
      case kArray:
        return array(depth);
      default:
        TORCH_CHECK(false, kGguf, ": ", name_, ": byte ", position_, ": ", type, " is no type of a metadata value");
    }
  }
  void need(uint64_t num_bytes) const {
    TORCH_CHECK(num_bytes <= left(), kGguf, ": ", name_, " ends inside its header: at byte ", position_, " it needs ",
                num_bytes, " more but has ", left(), "; incomplete download?");
  }

 private:
  json array(int depth) {
    TORCH_CHECK(depth < kMaxNesting, kGguf, ": ", name_, ": arrays are nested deeper than ", kMaxNesting);
    const auto type = value<uint32_t>();
    const auto count = value<uint64_t>();
    need(count);  // an element takes at least a byte
    budget_.add_container();
    budget_.add_values(count);
    json result = json::array();
    result.get_ref<json::array_t&>().reserve(count);
    for (uint64_t i = 0; i < count; ++i) result.push_back(metadata_value(type, depth + 1));
    return result;
  }

  const unsigned char* begin_;
  size_t size_, position_ = 0;
  const std::string& name_;
  std::string where_;
  JsonBudget budget_;
};

template <class T>
void append(std::string& bytes, const T& value) {
  if constexpr (std::is_same_v<T, std::string>) {
    append(bytes, uint64_t{value.size()});
    bytes += value;
  } else {
    bytes.append(reinterpret_cast<const char*>(&value), sizeof(T));
  }
}

/// By alternative of GgufMetadata::Value; for an array the type of its elements.
constexpr uint32_t kWrittenTypes[] = {kUint32, kFloat32, kBool, kString, kString, kInt32};

template <class T>
void append_typed(std::string& bytes, uint32_t type, const T& value) {
  append(bytes, type);
  append(bytes, value);
}

template <class T>
void append_typed(std::string& bytes, uint32_t type, const std::vector<T>& values) {
  append(bytes, uint32_t{kArray});
  append(bytes, type);
  append(bytes, uint64_t{values.size()});
  for (const T& value : values) append(bytes, value);
}

}  // namespace

GgufFile::GgufFile(const std::filesystem::path& path) : name_(path.string()) {
  const FileDescriptor file = open_regular_file(kGguf, path);
  size_ = size_of(kGguf, file, path);
  TORCH_CHECK(size_ > 0, kGguf, ": ", name_, " is empty");
  bytes_ = map_file(kGguf, file, size_, path);
  mapped_ = true;
  read_header();
}

GgufFile::GgufFile(std::shared_ptr<const void> bytes, size_t size, std::string name)
    : bytes_(std::move(bytes)), size_(size), name_(std::move(name)) {
  read_header();
}

void GgufFile::read_header() {
  Cursor cursor(static_cast<const unsigned char*>(bytes_.get()), size_, name_);
  refuse_lfs_pointer({static_cast<const char*>(bytes_.get()), size_}, std::string(kGguf) + ": " + name_);
  TORCH_CHECK(cursor.value<uint32_t>() == kMagic, kGguf, ": ", name_, " is not a GGUF file");
  const auto version = cursor.value<uint32_t>();
  TORCH_CHECK(version == 2 || version == 3, kGguf, ": ", name_, " has version ", version,
              ", expected 2 or 3 in little-endian order");
  const auto num_tensors = cursor.value<uint64_t>(), num_pairs = cursor.value<uint64_t>();
  for (uint64_t i = 0; i < num_pairs; ++i) {
    const std::string key = cursor.text();
    cursor.budget().add_member(key.size());
    json value = cursor.metadata_value(cursor.value<uint32_t>());
    TORCH_CHECK(metadata_.emplace(key, std::move(value)).second, kGguf, ": ", name_, " has the key ", quote(key),
                " twice");
  }
  uint64_t alignment = kAlignment;
  if (const auto it = metadata_.find("general.alignment"); it != metadata_.end()) {
    TORCH_CHECK(
        it->is_number_unsigned() && it->get<uint64_t>() <= kMaxAlignment && std::has_single_bit(it->get<uint64_t>()),
        kGguf, ": ", name_, ": general.alignment is ", short_json(*it), ", expected a power of two");
    alignment = it->get<uint64_t>();
  }
  for (uint64_t i = 0; i < num_tensors; ++i) {
    const std::string name = cursor.text();
    cursor.budget().add(kEntryBytes);
    const std::string where = std::string(kGguf) + ": " + name_ + ": tensor " + quote(name) + " ";
    const auto dimensions = cursor.value<uint32_t>();
    TORCH_CHECK(dimensions <= kMaxDimensions, where, "has ", dimensions, " dimensions, expected at most ",
                kMaxDimensions);
    Entry entry;
    entry.shape.resize(dimensions);
    uint64_t count = 1;
    for (auto size = entry.shape.rbegin(); size != entry.shape.rend(); ++size) {
      const auto stored = cursor.value<uint64_t>();
      // Times the bytes of an element it is still a number of bytes.
      constexpr uint64_t kMaxCount = uint64_t{1} << 56;
      TORCH_CHECK(stored > 0 && stored <= kMaxCount / count, where, "has a dimension of ", stored,
                  ", which no file can hold");
      count *= stored;
      *size = static_cast<int64_t>(stored);
    }
    entry.type = cursor.value<uint32_t>();
    entry.offset = cursor.value<uint64_t>();
    TORCH_CHECK(entry.offset % alignment == 0, where, "begins at ", entry.offset, ", which is not a multiple of ",
                alignment);
    TORCH_CHECK(tensors_.emplace(name, std::move(entry)).second, where, "is there twice");
  }
  const uint64_t data = (cursor.position() + alignment - 1) / alignment * alignment;
  for (auto& [name, entry] : tensors_) {
    TORCH_CHECK(data <= size_ && entry.offset <= size_ - data, kGguf, ": ", name_, ": tensor ", quote(name),
                " begins behind the end of the file; incomplete download?");
    entry.offset += data;
  }
}

void GgufFile::release_pages() const {
  if (mapped_) ::madvise(const_cast<void*>(bytes_.get()), size_, MADV_DONTNEED);
}

Tensor GgufFile::bytes(std::string_view name, int64_t num_bytes) const {
  const auto it = tensors_.find(name);
  TORCH_CHECK(it != tensors_.end(), kGguf, ": ", name_, " has no tensor ", quote(name));
  const uint64_t offset = it->second.offset;
  TORCH_CHECK(num_bytes >= 0 && static_cast<uint64_t>(num_bytes) <= size_ - offset, kGguf, ": ", name_, ": tensor ",
              quote(name), " takes ", num_bytes, " bytes but ", size_ - offset,
              " are left in the file; incomplete download?");
  auto* begin = static_cast<unsigned char*>(const_cast<void*>(bytes_.get())) + offset;
  return at::from_blob(
      begin, {num_bytes}, [keep = bytes_](void*) {}, at::TensorOptions().dtype(at::kByte));
}

Tensor gguf_values(const GgufFile& file, const std::string& name) {
  const GgufFile::Entry& entry = file.tensors().at(name);
  const auto type = static_cast<GgufType>(entry.type);
  return gguf_values(type, file.bytes(name, gguf_num_bytes(type, entry.shape)), entry.shape);
}

void GgufMetadata::add(const std::string& key, const Value& value) {
  append(bytes_, key);
  std::visit([&](const auto& typed) { append_typed(bytes_, kWrittenTypes[value.index()], typed); }, value);
  ++count_;
}

int64_t GgufTensorInfo::num_bytes() const { return gguf_num_bytes(type, shape); }

int64_t gguf_padded(int64_t num_bytes) { return (num_bytes + kAlignment - 1) / kAlignment * kAlignment; }

std::string gguf_header(const GgufMetadata& metadata, const std::vector<GgufTensorInfo>& tensors) {
  std::string bytes;
  append(bytes, kMagic);
  append(bytes, kWrittenVersion);
  append(bytes, uint64_t{tensors.size()});
  append(bytes, metadata.count());
  bytes += metadata.bytes();
  uint64_t offset = 0;
  for (const GgufTensorInfo& tensor : tensors) {
    append(bytes, tensor.name);
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
