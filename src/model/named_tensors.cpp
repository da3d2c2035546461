#include "baseq/model/named_tensors.h"

#include <ATen/ATen.h>

#include "baseq/io/dtype_name.h"

namespace baseq {
namespace {

constexpr std::string_view kPrefix = "model.";
constexpr std::string_view kEmbedding = "embed_tokens.weight";

}  // namespace

NamedTensors::NamedTensors(const Checkpoint& checkpoint, const ModelConfig& config, bool fused)
    : checkpoint_(checkpoint),
      prefixed_(checkpoint.contains(std::string(kPrefix) + std::string(kEmbedding)) ||
                !checkpoint.contains(kEmbedding)),
      fused_(fused),
      q_rows_(config.num_attention_heads * config.head_dim),
      kv_rows_(config.num_key_value_heads * config.head_dim),
      ffn_rows_(config.intermediate_size) {}

NamedTensors::Location NamedTensors::locate(std::string_view name) const {
  Location location{std::string(!prefixed_ && name.starts_with(kPrefix) ? name.substr(kPrefix.size()) : name)};
  if (!fused_) return location;
  const int64_t qkv_rows = q_rows_ + 2 * kv_rows_;
  struct Part {
    std::string_view name, fused;
    int64_t first_row, num_rows, total_rows;
  };
  const Part parts[] = {{"self_attn.q_proj.", "self_attn.qkv_proj.", 0, q_rows_, qkv_rows},
                        {"self_attn.k_proj.", "self_attn.qkv_proj.", q_rows_, kv_rows_, qkv_rows},
                        {"self_attn.v_proj.", "self_attn.qkv_proj.", q_rows_ + kv_rows_, kv_rows_, qkv_rows},
                        {"mlp.gate_proj.", "mlp.gate_up_proj.", 0, ffn_rows_, 2 * ffn_rows_},
                        {"mlp.up_proj.", "mlp.gate_up_proj.", ffn_rows_, ffn_rows_, 2 * ffn_rows_}};
  for (const Part& part : parts) {
    const size_t position = location.name.find(part.name);
    if (position == std::string::npos) continue;
    location.name.replace(position, part.name.size(), part.fused);
    location.first_row = part.first_row;
    location.num_rows = part.num_rows;
    location.total_rows = part.total_rows;
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
