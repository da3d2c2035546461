#include "safetensors_stream.h"

#include "safetensors_layout.h"

namespace baseq {

void SafetensorsStream::add(const std::string& name, const Tensor& tensor) {
  offsets_.emplace(name, scratch_.size());
  scratch_.append(tensor.const_data_ptr(), tensor.nbytes());
  infos_.emplace(name, TensorInfo{tensor.scalar_type(), tensor.sizes().vec()});
}

void SafetensorsStream::write(const std::filesystem::path& path) {
  const StoredLayout layout = safetensors_layout(infos_, {{"format", "pt"}}, who_ + ": " + path.string());
  FileWriter file(who_, path);
  file.write(layout.header);
  for (const std::string& name : layout.order) {
    scratch_.copy_to(file, offsets_.at(name), stored_bytes(infos_.at(name)));
  }
  file.commit();
  scratch_.clear();
  infos_.clear();
  offsets_.clear();
}

}  // namespace baseq
