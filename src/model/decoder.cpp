#include "baseq/model/decoder.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <set>

#include "../integer/float_linear.h"
#include "exact_rotary.h"

namespace baseq {
namespace {

/// RoPE of the new rows of all sequences.
RotaryEmbedding rope_of(std::span<KvCache* const> caches, const std::vector<int64_t>& rows) {
  if (caches.size() == 1) return caches[0]->rope(rows[0]);
  std::vector<Tensor> cos, sin;
  for (size_t i = 0; i < caches.size(); ++i) {
    const RotaryEmbedding part = caches[i]->rope(rows[i]);
    cos.push_back(part.cos);
    sin.push_back(part.sin);
  }
  return {at::cat(cos), at::cat(sin)};
}

/// int64 [1, rows] of all sequences.
Tensor joined_ids(std::span<const std::span<const int32_t>> tokens) {
  int64_t count = 0;
  for (const auto& sequence : tokens) count += static_cast<int64_t>(sequence.size());
  const Tensor ids = at::empty({1, count}, at::kLong);
  auto* out = ids.mutable_data_ptr<int64_t>();
  for (const auto& sequence : tokens) out = std::copy(sequence.begin(), sequence.end(), out);
  return ids;
}

void check_sequences(std::span<const std::span<const int32_t>> tokens, std::span<KvCache* const> caches) {
  TORCH_CHECK(!tokens.empty() && tokens.size() == caches.size(), "Decoder: ", tokens.size(), " sequences and ",
              caches.size(), " caches");
  std::set<const KvCache*> seen;
  for (size_t i = 0; i < tokens.size(); ++i) {
    TORCH_CHECK(!tokens[i].empty(), "Decoder: sequence ", i, " has no tokens");
    TORCH_CHECK(caches[i] != nullptr && seen.insert(caches[i]).second, "Decoder: cache ", i,
                " is null or the cache of two sequences");
  }
  for (size_t i = 0; i < tokens.size(); ++i) caches[i]->reserve(static_cast<int64_t>(tokens[i].size()));
}

int64_t bytes_of(const Linear& linear) {
  int64_t total = linear.prepared ? linear.prepared->bytes() : linear.panels ? linear.panels->bytes() : 0;
  for (const Tensor& part : {linear.weight, linear.bias}) {
    if (part.defined()) total += static_cast<int64_t>(part.nbytes());
  }
  return total;
}

}  // namespace

Decoder::Decoder(const Model& model, const LoadOptions& options)
    : model_(model), options_(options), final_norm_(model.final_norm(options)), head_(model.lm_head(options)) {
  for (int64_t i = 0; i < config().num_hidden_layers; ++i) {
    layers_.push_back(model.layer(i, options));
    // Floats keep the codes that they come from for those who store them again.
    layers_.back().for_each_linear([](const std::string&, Linear& linear) {
      linear.quantized.reset();
      linear.lora = {};
    });
  }
  model.checkpoint().release_pages();
}

int64_t Decoder::bytes() const {
  int64_t total = bytes_of(head_) + static_cast<int64_t>(final_norm_.weight.nbytes());
  for (const DecoderLayer& layer : layers_) {
    layer.for_each_linear([&](const std::string&, const Linear& linear) { total += bytes_of(linear); });
    layer.for_each_norm([&](const std::string&, const RmsNorm& norm) {
      if (norm.weight.defined()) total += static_cast<int64_t>(norm.weight.nbytes());
    });
  }
  return total;
}

Tensor Decoder::head_logits(const Tensor& hidden) const { return head_.forward(final_norm_.forward(hidden)); }

Tensor Decoder::logits(const Tensor& input_ids) const {
  const c10::NoGradGuard no_grad;
  TORCH_CHECK(input_ids.dim() == 1 || input_ids.dim() == 2, "Decoder: ids are ", input_ids.sizes(),
              ", expected [seq] or [batch, seq]");
  const bool single = input_ids.dim() == 1;
  Tensor hidden = model_.embed(single ? input_ids.unsqueeze(0) : input_ids);
  const RotaryEmbedding rope = rotary_of(model_, hidden.size(1), options_);
  for (const DecoderLayer& layer : layers_) hidden = layer.forward(hidden, rope);
  const Tensor logits = head_logits(hidden);
  return single ? logits[0] : logits;
}

KvCache Decoder::new_cache(int64_t capacity) const {
  const at::TensorOptions compute = at::TensorOptions().dtype(model_.options().dtype).device(model_.options().device);
  const std::optional<QuantSpec> grid = model_.quantization() ? model_.quantization()->kv_cache : std::nullopt;
  if (model_.runs_integers(options_) && has_pages(grid, config().head_dim)) {
    return {config(), {.compute = compute, .stored = kPagedFloats, .paged = true, .grid = grid}, capacity};
  }
  return {config(), {.compute = compute, .stored = model_.options().dtype}, capacity};
}

Tensor Decoder::forward(std::span<const std::span<const int32_t>> tokens, std::span<KvCache* const> caches,
                        bool all_positions) const {
  const c10::NoGradGuard no_grad;
  check_sequences(tokens, caches);
  CachedRows cached{.caches = {caches.begin(), caches.end()}};
  for (const auto& sequence : tokens) cached.rows.push_back(static_cast<int64_t>(sequence.size()));
  Tensor hidden = model_.embed(joined_ids(tokens));
  const RotaryEmbedding rope = rope_of(caches, cached.rows);
  for (const DecoderLayer& layer : layers_) {
    hidden = layer.forward(hidden, rope, &cached);
    ++cached.block;
  }
  hidden = hidden[0];
  if (!all_positions) {
    std::vector<int64_t> last;
    for (const int64_t rows : cached.rows) last.push_back((last.empty() ? -1 : last.back()) + rows);
    hidden = hidden.index_select(0, at::tensor(last, at::kLong).to(hidden.device()));
  }
  const Tensor logits = head_logits(hidden);
  for (size_t i = 0; i < caches.size(); ++i) caches[i]->advance(cached.rows[i]);
  return logits;
}

Tensor Decoder::forward(std::span<const int32_t> tokens, KvCache& cache, bool all_positions) const {
  KvCache* const caches[] = {&cache};
  return forward(std::span(&tokens, 1), caches, all_positions);
}

}  // namespace baseq
