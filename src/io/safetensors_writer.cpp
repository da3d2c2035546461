#include "baseq/io/safetensors_writer.h"

#include <ATen/ATen.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <nlohmann/json.hpp>

#include "baseq/io/safetensors.h"
#include "files.h"
#include "safetensors_format.h"
#include "strict_json.h"

namespace baseq {
namespace {

constexpr const char* kWho = kSafetensorsWho;
constexpr int64_t kCopyBytes = int64_t{4} << 20;

std::string where(const std::filesystem::path& path) { return std::string(kWho) + ": " + path.string(); }

}  // namespace

SafetensorsWriter::SafetensorsWriter(const std::filesystem::path& path,
                                     const std::map<std::string, std::string>& metadata)
    : path_(path), metadata_(metadata) {
  std::filesystem::path data = path_;
  data += ".data";
  ::unlink(data.c_str());  // what an earlier process left; a link in its place is not followed
  descriptor_ = ::open(data.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (descriptor_ < 0) {
    throw_system_error(kWho, "create", data, errno);
  }
  ::unlink(data.c_str());  // no name: nothing is left of it whatever ends the process
}

SafetensorsWriter::~SafetensorsWriter() { ::close(descriptor_); }

void SafetensorsWriter::add(const std::string& name, const Tensor& tensor) {
  TORCH_CHECK(name != kSafetensorsMetadataKey, where(path_), ": a tensor cannot be named ", kSafetensorsMetadataKey);
  TORCH_CHECK(!entries_.contains(name), where(path_), ": tensor ", quote(name), " was added before");
  TORCH_CHECK(tensor.defined(), where(path_), ": tensor ", quote(name), " is undefined");
  TORCH_CHECK(tensor.layout() == at::kStrided, where(path_), ": tensor ", quote(name), " has layout ", tensor.layout(),
              ", expected a dense one");
  const at::ScalarType type = tensor.scalar_type();
  const auto dtype = std::find_if(kSafetensorsDTypes.begin(), kSafetensorsDTypes.end(),
                                  [&](const SafetensorsDType& d) { return d.type == type; });
  TORCH_CHECK(dtype != kSafetensorsDTypes.end(), where(path_), ": tensor ", quote(name), " has dtype ", type,
              ", expected one of ", kSafetensorsDTypeNames);
  dump_json(name, where(path_) + ": the tensor name " + quote(name));  // throws unless it is UTF-8
  const Tensor data = tensor.detach().to(at::kCPU).resolve_neg().contiguous();
  const auto num_bytes = static_cast<int64_t>(data.nbytes());
  write_all(kWho, descriptor_, path_, data.const_data_ptr(), data.nbytes());
  entries_.emplace(name, Entry{dtype->name, c10::elementSize(type), data.sizes().vec(), num_bytes_, num_bytes});
  num_bytes_ += num_bytes;
}

void SafetensorsWriter::commit() {
  // Large elements first keep every tensor aligned without holes; the map has sorted the names already.
  std::vector<const std::pair<const std::string, Entry>*> order;
  for (const auto& entry : entries_) order.push_back(&entry);
  std::stable_sort(order.begin(), order.end(),
                   [](const auto* a, const auto* b) { return a->second.element_size > b->second.element_size; });
  std::string header = "{";
  if (!metadata_.empty()) {
    header +=
        std::string("\"") + kSafetensorsMetadataKey + "\":" + dump_json(metadata_, where(path_) + ": the metadata");
  }
  int64_t offset = 0;
  for (const auto* item : order) {
    const auto& [name, entry] = *item;
    header += header.size() > 1 ? "," : "";
    header += dump_json(name, where(path_)) + ":{\"dtype\":\"" + entry.dtype +
              "\",\"shape\":" + nlohmann::json(entry.shape).dump() + ",\"data_offsets\":[" + std::to_string(offset) +
              "," + std::to_string(offset + entry.num_bytes) + "]}";
    offset += entry.num_bytes;
  }
  header += "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  TORCH_CHECK(header.size() <= kMaxSafetensorsHeaderBytes, where(path_), ": the header takes ", header.size(),
              " bytes, expected at most ", kMaxSafetensorsHeaderBytes);

  FileWriter file(kWho, path_);
  const uint64_t length = header.size();
  file.write(&length, kSafetensorsLengthBytes);
  file.write(header);
  std::string buffer(static_cast<size_t>(std::min(kCopyBytes, num_bytes_)), '\0');
  for (const auto* item : order) {
    const Entry& entry = item->second;
    for (int64_t done = 0; done < entry.num_bytes;) {
      const auto size = static_cast<size_t>(std::min(kCopyBytes, entry.num_bytes - done));
      read_exactly(kWho, descriptor_, path_, entry.begin + done, buffer.data(), size);
      file.write(buffer.data(), size);
      done += static_cast<int64_t>(size);
    }
  }
  file.commit();
}

void save_safetensors(const std::filesystem::path& path, const std::map<std::string, Tensor>& tensors,
                      const std::map<std::string, std::string>& metadata) {
  SafetensorsWriter writer(path, metadata);
  for (const auto& [name, tensor] : tensors) writer.add(name, tensor);
  writer.commit();
}

}  // namespace baseq
