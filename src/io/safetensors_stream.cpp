#include "safetensors_stream.h"

#include "safetensors_layout.h"

namespace baseq {
namespace {

StoredLayout layout_of(const SafetensorsStream::Infos& infos, const std::string& where) {
  return safetensors_layout(infos, {{"baseq", "weights"}, {"format", "pt"}}, where);
}

/// Where in the file the data of each tensor lies.
std::map<std::string, size_t> offsets_of(const StoredLayout& layout, const SafetensorsStream::Infos& infos) {
  std::map<std::string, size_t> offsets;
  size_t offset = layout.header.size();
  for (const std::string& name : layout.order) {
    offsets[name] = offset;
    offset += stored_bytes(infos.at(name));
  }
  return offsets;
}

}  // namespace

SafetensorsStream::SafetensorsStream(std::string who, const std::filesystem::path& path, const Infos& expected)
    : who_(std::move(who)), path_(path), file_(who_, path), expected_(expected) {
  if (expected_.empty()) return;
  const StoredLayout layout = layout_of(expected_, who_ + ": " + path_.string());
  planned_ = offsets_of(layout, expected_);
  end_ = planned_.at(layout.order.back()) + stored_bytes(expected_.at(layout.order.back()));
}

void SafetensorsStream::add(const std::string& name, const Tensor& tensor) {
  const TensorInfo info{tensor.scalar_type(), tensor.sizes().vec()};
  const auto expected = expected_.find(name);
  const bool known =
      expected != expected_.end() && expected->second.dtype == info.dtype && expected->second.shape == info.shape;
  const size_t offset = known ? planned_.at(name) : end_;
  if (!known) end_ += tensor.nbytes();
  file_.write(tensor.const_data_ptr(), tensor.nbytes(), offset);
  offsets_.emplace(name, offset);
  infos_.emplace(name, info);
  num_bytes_ += tensor.nbytes();
}

void SafetensorsStream::finish() {
  const StoredLayout layout = layout_of(infos_, who_ + ": " + path_.string());
  if (offsets_of(layout, infos_) == offsets_) {
    file_.write(layout.header.data(), layout.header.size(), 0);
    file_.commit();
    return;
  }
  FileWriter file(who_, path_);
  file.write(layout.header);
  for (const std::string& name : layout.order) {
    file_.copy_to(file, offsets_.at(name), stored_bytes(infos_.at(name)));
  }
  file.commit();
}

}  // namespace baseq
