#include <ATen/ATen.h>
#include <sys/mman.h>
#include <zlib.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "baseq/io/checkpoint.h"
#include "files.h"
#include "io/dtype_name.h"
#include "safetensors_layout.h"
#include "strict_json.h"

// The format: 8 bytes, the header's length N (little-endian); N bytes, the header, a JSON object padded with spaces;
// the data. The header maps each name to {"dtype", "shape", "data_offsets": [begin, end)} with offsets into the data.
// https://github.com/huggingface/safetensors
static_assert(std::endian::native == std::endian::little, "safetensors data is little-endian and is not converted");

namespace baseq {
namespace {

using nlohmann::json;

constexpr size_t kLengthBytes = 8;
constexpr size_t kMaxHeaderBytes = 100'000'000;  // the limit of the reference implementation
constexpr const char* kMetadataKey = "__metadata__";
constexpr const char* kSafetensors = "safetensors";

struct DType {
  const char* name;
  at::ScalarType type;
};
constexpr std::array<DType, 10> kDTypes = {{{"F64", at::kDouble},
                                            {"F32", at::kFloat},
                                            {"F16", at::kHalf},
                                            {"BF16", at::kBFloat16},
                                            {"I64", at::kLong},
                                            {"I32", at::kInt},
                                            {"I16", at::kShort},
                                            {"I8", at::kChar},
                                            {"U8", at::kByte},
                                            {"BOOL", at::kBool}}};
constexpr const char* kDTypeNames = "F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL";

// The field `key` of a tensor's entry. `where` begins every message: the file and the tensor.
const json& field(const json& entry, const char* key, const std::string& where) {
  const auto found = entry.find(key);
  TORCH_CHECK(found != entry.end(), where, "has no ", key);
  return *found;
}

at::ScalarType parse_dtype(const json& value, const std::string& where) {
  TORCH_CHECK(value.is_string(), where, "has a dtype that is not a string");
  const auto& name = value.get_ref<const std::string&>();
  const auto found = std::find_if(kDTypes.begin(), kDTypes.end(), [&](const DType& d) { return name == d.name; });
  TORCH_CHECK(found != kDTypes.end(), where, "has dtype ", quote(name), ", expected one of ", kDTypeNames);
  return found->type;
}

std::vector<uint64_t> parse_sizes(const json& value, const char* what, const std::string& where) {
  TORCH_CHECK(value.is_array(), where, "has ", what, " that is not a list");
  std::vector<uint64_t> sizes;
  sizes.reserve(value.size());
  for (const json& size : value) {
    // A literal without sign, fraction and exponent that fits 64 bits; anything else is another JSON number type.
    TORCH_CHECK(size.is_number_unsigned() && size.get<uint64_t>() <= std::numeric_limits<int64_t>::max(), where, "has ",
                what, " with an element that is not an integer from 0 to 2^63 - 1");
    sizes.push_back(size.get<uint64_t>());
  }
  return sizes;
}

// Bytes that a tensor takes. Sizes of 0 count as 1 in the check, because strides are computed that way.
size_t num_bytes_of(const std::vector<uint64_t>& shape, size_t element_size, const std::string& where) {
  size_t limit = element_size;
  bool empty = false;
  for (const uint64_t size : shape) {
    empty = empty || size == 0;
    const uint64_t factor = std::max<uint64_t>(size, 1);
    TORCH_CHECK(factor <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) / limit, where,
                "has a shape whose byte count overflows 64 bits");
    limit *= factor;
  }
  return empty ? 0 : limit;
}

json parse_header(const unsigned char* file, size_t file_size, const std::string& path, size_t* header_size) {
  uint64_t length = 0;
  std::memcpy(&length, file, kLengthBytes);
  TORCH_CHECK(length <= kMaxHeaderBytes, kSafetensors, ": ", path, " declares a header of ", length,
              " bytes, expected at most ", kMaxHeaderBytes, "; is it a safetensors file?");
  TORCH_CHECK(length <= file_size - kLengthBytes, kSafetensors, ": ", path, " has ", file_size,
              " bytes, too few for its header of ", length, " bytes; incomplete download?");
  const std::string_view text(reinterpret_cast<const char*>(file) + kLengthBytes, length);
  TORCH_CHECK(text.starts_with('{'), kSafetensors, ": the header of ", path,
              " is not a JSON object (it does not begin with '{'); is it a safetensors file?");
  *header_size = length;
  return parse_json(text, std::string(kSafetensors) + ": the header of " + path, DuplicateKeys::kRefuse);
}

std::map<std::string, std::string> parse_metadata(const json& value, const std::string& path) {
  TORCH_CHECK(value.is_object(), kSafetensors, ": ", path, " has a __metadata__ that is not an object");
  std::map<std::string, std::string> metadata;
  for (const auto& [key, text] : value.items()) {
    TORCH_CHECK(text.is_string(), kSafetensors, ": ", path, " has the __metadata__ entry ", quote(key),
                " that is not a string");
    metadata.emplace(key, text.get<std::string>());
  }
  return metadata;
}

struct Extent {
  size_t begin, end;
  const std::string* name;
};

// The tensors must fill the data section: no byte belongs to two of them, none to nobody.
void check_extents(std::vector<Extent> extents, size_t data_size, const std::string& path) {
  std::sort(extents.begin(), extents.end(),
            [](const Extent& a, const Extent& b) { return std::pair(a.begin, a.end) < std::pair(b.begin, b.end); });
  size_t position = 0;
  for (const Extent& extent : extents) {
    TORCH_CHECK(extent.begin >= position, kSafetensors, ": ", path, ": tensor ", quote(*extent.name),
                " begins at data byte ", extent.begin, " and overlaps the tensor that ends at ", position);
    TORCH_CHECK(extent.begin == position, kSafetensors, ": ", path, ": data bytes ", position, " to ", extent.begin,
                " before tensor ", quote(*extent.name), " belong to no tensor");
    position = extent.end;
  }
  TORCH_CHECK(position == data_size, kSafetensors, ": ", path, ": the tensors end at data byte ", position,
              " but the data section ends at ", data_size);
}

}  // namespace

const char* dtype_name(at::ScalarType dtype) {
  const auto found = std::find_if(kDTypes.begin(), kDTypes.end(), [&](const DType& d) { return d.type == dtype; });
  return found != kDTypes.end() ? found->name : c10::toString(dtype);
}

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path) : path_(path) {
  const std::string file_name = path_.string();
  const FileDescriptor file = open_regular_file(kSafetensors, path_);
  const size_t file_size = size_of(kSafetensors, file, path_);
  TORCH_CHECK(file_size >= kLengthBytes, kSafetensors, ": ", file_name, " has ", file_size,
              " bytes, expected at least ", kLengthBytes, "; incomplete download?");
  mapping_ = map_file(kSafetensors, file, file_size, path_);
  mapped_bytes_ = file_size;
  const auto* bytes = static_cast<const unsigned char*>(mapping_.get());
  refuse_lfs_pointer({reinterpret_cast<const char*>(bytes), file_size}, std::string(kSafetensors) + ": " + file_name);
  size_t header_size = 0;
  const json header = parse_header(bytes, file_size, file_name, &header_size);
  data_ = bytes + kLengthBytes + header_size;
  const size_t data_size = file_size - kLengthBytes - header_size;

  std::vector<Extent> extents;
  for (const auto& [name, value] : header.items()) {
    if (name == kMetadataKey) {
      metadata_ = parse_metadata(value, file_name);
      continue;
    }
    const std::string where = std::string(kSafetensors) + ": " + file_name + ": tensor " + quote(name) + " ";
    TORCH_CHECK(value.is_object(), where, "is described by something that is not an object");
    const at::ScalarType dtype = parse_dtype(field(value, "dtype", where), where);
    const std::vector<uint64_t> shape = parse_sizes(field(value, "shape", where), "a shape", where);
    const std::vector<uint64_t> range = parse_sizes(field(value, "data_offsets", where), "data_offsets", where);
    TORCH_CHECK(range.size() == 2, where, "has ", range.size(), " data_offsets, expected 2");
    TORCH_CHECK(range[0] <= range[1], where, "has data_offsets that begin at ", range[0], " and end at ", range[1]);
    TORCH_CHECK(range[1] <= data_size, where, "ends at data byte ", range[1], " but the file has only ", data_size,
                " data bytes; incomplete download?");
    const size_t expected = num_bytes_of(shape, c10::elementSize(dtype), where);
    TORCH_CHECK(range[1] - range[0] == expected, where, "has data_offsets that hold ", range[1] - range[0],
                " bytes but its shape and dtype take ", expected);
    const auto [entry, inserted] =
        entries_.emplace(name, Entry{{dtype, {shape.begin(), shape.end()}}, range[0], range[1]});
    TORCH_INTERNAL_ASSERT(inserted);
    extents.push_back({range[0], range[1], &entry->first});
  }
  check_extents(std::move(extents), data_size, file_name);
}

std::vector<std::string> SafetensorsFile::names() const {
  std::vector<std::string> names;
  names.reserve(entries_.size());
  for (const auto& [name, entry] : entries_) {
    names.push_back(name);
  }
  return names;
}

bool SafetensorsFile::contains(std::string_view name) const { return entries_.find(name) != entries_.end(); }

const SafetensorsFile::Entry& SafetensorsFile::find(std::string_view name) const {
  const auto found = entries_.find(name);
  TORCH_CHECK(found != entries_.end(), kSafetensors, ": ", path_.string(), " has no tensor ", quote(name));
  return found->second;
}

TensorInfo SafetensorsFile::info(std::string_view name) const { return find(name); }

void SafetensorsFile::release_pages() const {
  // The mapping is read-only, so its pages hold nothing that the file does not.
  ::madvise(const_cast<void*>(mapping_.get()), mapped_bytes_, MADV_DONTNEED);
}

Tensor SafetensorsFile::tensor(std::string_view name) const {
  const Entry& entry = find(name);
  const unsigned char* begin = data_ + entry.begin;
  const size_t num_bytes = entry.end - entry.begin;
  if (entry.dtype == at::kBool) {  // any other byte in a bool is undefined behaviour
    TORCH_CHECK(std::all_of(begin, begin + num_bytes, [](unsigned char byte) { return byte <= 1; }), kSafetensors, ": ",
                path_.string(), ": tensor ", quote(name), " is BOOL but holds bytes other than 0 and 1");
  }
  const bool aligned = reinterpret_cast<uintptr_t>(begin) % c10::elementSize(entry.dtype) == 0;
  if (num_bytes == 0 || !aligned) {
    Tensor copy = at::empty(entry.shape, entry.dtype);
    if (num_bytes > 0) {
      std::memcpy(copy.data_ptr(), begin, num_bytes);
    }
    return copy;
  }
  return at::from_blob(
      const_cast<unsigned char*>(begin), entry.shape, [keep = mapping_](void*) {},
      at::TensorOptions().dtype(entry.dtype));
}

StoredLayout safetensors_layout(const std::map<std::string, TensorInfo>& tensors,
                                const std::map<std::string, std::string>& metadata, const std::string& where) {
  StoredLayout layout;
  for (const auto& [name, info] : tensors) {
    TORCH_CHECK(name != kMetadataKey, where, ": a tensor cannot be named ", kMetadataKey);
    layout.order.push_back(name);
  }
  // Large elements first keep every tensor aligned without holes; the map has sorted the names already.
  std::stable_sort(layout.order.begin(), layout.order.end(), [&](const std::string& a, const std::string& b) {
    return c10::elementSize(tensors.at(a).dtype) > c10::elementSize(tensors.at(b).dtype);
  });
  std::string header = "{";
  if (!metadata.empty()) {
    header += std::string("\"") + kMetadataKey + "\":" + dump_json(metadata, where + ": the metadata");
  }
  size_t offset = 0;
  for (const std::string& name : layout.order) {
    const TensorInfo& info = tensors.at(name);
    const auto dtype =
        std::find_if(kDTypes.begin(), kDTypes.end(), [&](const DType& d) { return d.type == info.dtype; });
    TORCH_CHECK(dtype != kDTypes.end(), where, ": tensor ", quote(name), " has dtype ", dtype_name(info.dtype),
                ", expected one of ", kDTypeNames);
    const size_t end = offset + stored_bytes(info);
    header += header.size() > 1 ? "," : "";
    header += dump_json(name, where + ": the tensor name " + quote(name)) + ":{\"dtype\":\"" + dtype->name +
              "\",\"shape\":" + json(info.shape).dump() + ",\"data_offsets\":[" + std::to_string(offset) + "," +
              std::to_string(end) + "]}";
    offset = end;
  }
  header += "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  TORCH_CHECK(header.size() <= kMaxHeaderBytes, where, ": the header takes ", header.size(),
              " bytes, expected at most ", kMaxHeaderBytes);
  const uint64_t length = header.size();
  layout.header.assign(reinterpret_cast<const char*>(&length), kLengthBytes);
  layout.header += header;
  return layout;
}

int64_t TensorInfo::numel() const { return c10::multiply_integers(shape); }

int64_t TensorInfo::nbytes() const { return numel() * static_cast<int64_t>(c10::elementSize(dtype)); }

size_t stored_bytes(const TensorInfo& info) { return static_cast<size_t>(info.nbytes()); }

Tensor storable(const Tensor& tensor, const std::string& what) {
  TORCH_CHECK(tensor.defined(), what, " is undefined");
  TORCH_CHECK(tensor.layout() == at::kStrided, what, " has layout ", tensor.layout(), ", expected a dense one");
  return tensor.detach().to(at::kCPU).resolve_neg().contiguous();
}

StoredFile write_safetensors(const std::filesystem::path& path, const std::map<std::string, Tensor>& tensors,
                             const std::map<std::string, std::string>& metadata) {
  const std::string where = std::string(kSafetensors) + ": " + path.string();
  std::map<std::string, TensorInfo> infos;
  for (const auto& [name, tensor] : tensors) {
    TORCH_CHECK(tensor.defined(), where, ": tensor ", quote(name), " is undefined");
    infos[name] = {tensor.scalar_type(), tensor.sizes().vec()};
  }
  SafetensorsWriter file(path, infos, metadata);
  for (const std::string& name : file.order()) file.append(name, tensors.at(name));
  file.commit();
  return {file.num_bytes(), file.crc32()};
}

void save_safetensors(const std::filesystem::path& path, const std::map<std::string, Tensor>& tensors,
                      const std::map<std::string, std::string>& metadata) {
  (void)write_safetensors(path, tensors, metadata);
}

SafetensorsWriter::SafetensorsWriter(const std::filesystem::path& path, std::map<std::string, TensorInfo> tensors,
                                     const std::map<std::string, std::string>& metadata)
    : where_(std::string(kSafetensors) + ": " + path.string()), infos_(std::move(tensors)) {
  StoredLayout layout = safetensors_layout(infos_, metadata, where_);
  order_ = std::move(layout.order);
  file_ = std::make_unique<FileWriter>(kSafetensors, path);
  write(layout.header.data(), layout.header.size());
}

SafetensorsWriter::~SafetensorsWriter() = default;

void SafetensorsWriter::append(const std::string& name, const Tensor& values) {
  const std::string what = where_ + ": tensor " + quote(name);
  TORCH_CHECK(num_complete_ < order_.size() && order_[num_complete_] == name, what, " is written out of order");
  const TensorInfo& info = infos_.at(name);
  const Tensor data = storable(values, what);
  const auto num_bytes = static_cast<int64_t>(data.nbytes());
  TORCH_CHECK(data.scalar_type() == info.dtype && num_bytes <= info.nbytes() - num_appended_, what, " is ",
              dtype_name(info.dtype), " ", at::IntArrayRef(info.shape), " but ", data.numel(), " more values of ",
              dtype_name(data.scalar_type()), " are written after ", num_appended_, " bytes");
  write(data.const_data_ptr(), data.nbytes());
  num_appended_ += num_bytes;
  if (num_appended_ < info.nbytes()) return;
  ++num_complete_;
  num_appended_ = 0;
}

void SafetensorsWriter::write(const void* data, size_t num_bytes) {
  file_->write(data, num_bytes);
  num_bytes_ += static_cast<int64_t>(num_bytes);
  crc32_ = static_cast<uint32_t>(::crc32_z(crc32_, static_cast<const Bytef*>(data), num_bytes));
}

void SafetensorsWriter::commit() {
  TORCH_CHECK(num_complete_ == order_.size(), where_, ": tensor ", quote(order_[num_complete_]), " is not complete");
  file_->commit();
}

}  // namespace baseq
