#include "model/named_tensors.h"

#include <ATen/ATen.h>

#include <utility>

#include "baseq/model/model.h"
#include "io/dtype_name.h"

namespace baseq {
namespace {

constexpr std::string_view kPrefix = "model.";
constexpr std::string_view kEmbedding = "embed_tokens.weight";

}  // namespace

NamedTensors::NamedTensors(Checkpoint checkpoint, const ModelConfig& config, bool fused)
    : checkpoint_(std::move(checkpoint)),
      prefixed_(checkpoint_.contains(std::string(kPrefix) + std::string(kEmbedding)) ||
                !checkpoint_.contains(kEmbedding)) {
  for (const SiteInfo& info : sites()) {
    if (!fused || info.fused.empty()) continue;
    const size_t first = parts_.size();
    int64_t rows = 0;
    for (const std::string_view reader : info.readers) {
      const int64_t own = linear_shape(config, reader).out_features;
      parts_.push_back({std::string(reader) + ".", {std::string(info.fused) + ".", rows, own}});
      rows += own;
    }
    for (size_t i = first; i < parts_.size(); ++i) parts_[i].fused.total_rows = rows;
  }
}

NamedTensors::Location NamedTensors::locate(std::string_view name) const {
  Location location{std::string(!prefixed_ && name.starts_with(kPrefix) ? name.substr(kPrefix.size()) : name)};
  for (const Part& part : parts_) {
    const size_t position = location.name.find(part.name);
    if (position == std::string::npos) continue;
    std::string stored = location.name.replace(position, part.name.size(), part.fused.name);
    location = part.fused;
    location.name = std::move(stored);
    break;
  }
  return location;
}

bool NamedTensors::contains(std::string_view name) const { return checkpoint_.contains(locate(name).name); }

std::string NamedTensors::stored_name(std::string_view name) const { return locate(name).name; }

TensorInfo NamedTensors::info(std::string_view name) const {
  const Location location = locate(name);
  TensorInfo info = checkpoint_.info(location.name);
  TORCH_CHECK(at::isFloatingType(info.dtype), location.name, ": dtype is ", dtype_name(info.dtype),
              " but weights are expected in floating point; is this checkpoint already quantized?");
  if (location.total_rows == 0) return info;
  TORCH_CHECK(!info.shape.empty() && info.shape[0] == location.total_rows, location.name, ": shape is ",
              at::IntArrayRef(info.shape), " but config.json says ", location.total_rows, " rows");
  info.shape[0] = location.num_rows;
  return info;
}

Tensor NamedTensors::tensor(std::string_view name) const {
  (void)info(name);  // throws where this does
  const Location location = locate(name);
  const Tensor tensor = checkpoint_.tensor(location.name);
  return location.total_rows == 0 ? tensor : tensor.narrow(0, location.first_row, location.num_rows);
}

}  // namespace baseq
