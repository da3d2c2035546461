#include <ATen/ATen.h>

#include <algorithm>
#include <utility>

#include "baseq/runtime/generate.h"

namespace baseq {
namespace {

constexpr int64_t kFloat32Bytes = 4;

/// A linear in memory: codes where it computes in integers, else float32.
int64_t linear_bytes(const Model& model, const LoadOptions& options, const std::string& name, int64_t num_weights) {
  const auto& linears = model.stored().linears;
  const auto format = linears.find(name);
  const bool integers =
      model.runs_integers(options) && format != linears.end() && format->second.weights && !format->second.group_index;
  if (!integers) return num_weights * kFloat32Bytes;
  return num_weights * format->second.weights->num_bits / 8;
}

int64_t cache_bytes_per_token(const Model& model) {
  const ModelConfig& config = model.config();
  const int64_t values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim;
  const bool codes = model.quantization() && model.quantization()->kv_cache;
  return codes ? values * model.quantization()->kv_cache->num_bits / 8 : values * kFloat32Bytes;
}

}  // namespace

Session::Session(const Decoder& decoder, Options options)
    : decoder_(decoder), options_(std::move(options)), cache_(decoder.new_cache(options_.context)) {
  TORCH_CHECK(options_.tokens_per_pass > 0, "`tokens_per_pass` is ", options_.tokens_per_pass);
}

Tensor Session::next_logits(std::span<const int32_t> sequence) {
  const int64_t vocab_size = decoder_.config().vocab_size;
  TORCH_CHECK(!sequence.empty(), "the prompt is empty");
  TORCH_CHECK(static_cast<int64_t>(sequence.size()) <= options_.context, "a sequence of ", sequence.size(),
              " tokens is longer than the context of ", options_.context);
  size_t known = static_cast<size_t>(std::ranges::mismatch(seen_, sequence).in2 - sequence.begin());
  known = std::min(known, sequence.size() - 1);  // the logits of the last token are not kept
  for (const int32_t id : sequence.subspan(known)) {
    TORCH_CHECK(id >= 0 && id < vocab_size, "token ", id, " but the model has ", vocab_size);
  }
  cache_.truncate(static_cast<int64_t>(known));
  seen_.resize(known);
  Tensor logits;
  while (seen_.size() < sequence.size()) {
    if (options_.cancelled && options_.cancelled()) return {};
    const auto pass = static_cast<size_t>(options_.tokens_per_pass);
    const std::span<const int32_t> tokens =
        sequence.subspan(seen_.size(), std::min(pass, sequence.size() - seen_.size()));
    logits = decoder_.forward(tokens, cache_);
    seen_.insert(seen_.end(), tokens.begin(), tokens.end());
  }
  return logits.view({-1}).to(at::kCPU, at::kFloat).contiguous();
}

int64_t resident_memory(const Model& model, const LoadOptions& options, int64_t context, int64_t sequences) {
  const ModelConfig& config = model.config();
  int64_t bytes = linear_bytes(model, options, "lm_head", config.vocab_size * config.hidden_size);
  for (int64_t block = 0; block < config.num_hidden_layers; ++block) {
    for (const LinearShape& linear : linear_shapes(config)) {
      bytes +=
          linear_bytes(model, options, layer_prefix(block) + linear.name, linear.out_features * linear.in_features);
    }
  }
  bytes += context * sequences * cache_bytes_per_token(model);
  const int64_t rows = std::min<int64_t>(context, Session::Options{}.tokens_per_pass) * sequences;
  return bytes + rows * (4 * config.hidden_size + 3 * config.intermediate_size) * kFloat32Bytes;
}

}  // namespace baseq
