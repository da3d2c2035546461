#include "baseq/model/site.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "baseq/model/decoder_layer.h"
#include "baseq/transform/hadamard.h"

namespace baseq {
namespace {

using Names = std::span<const std::string_view>;

constexpr std::string_view kQ = "self_attn.q_proj", kK = "self_attn.k_proj", kV = "self_attn.v_proj",
                           kO = "self_attn.o_proj", kGate = "mlp.gate_proj", kUp = "mlp.up_proj",
                           kDown = "mlp.down_proj";
constexpr std::string_view kQueryKey[] = {kQ, kK}, kValue[] = {kV}, kQkv[] = {kQ, kK, kV}, kHeads[] = {kO},
                           kGateUp[] = {kGate, kUp}, kGated[] = {kDown}, kAfterNorms[] = {kQ, kK, kV, kGate, kUp},
                           kBranches[] = {kO, kDown};

constexpr SiteInfo kSites[] = {
    {.site = Site::kResidual, .name = "residual", .writers = kBranches, .readers = kAfterNorms},
    {.site = Site::kQkv,
     .name = "qkv",
     .readers = kQkv,
     .norm = "input_layernorm",
     .point = "self_attn.input_quant",
     .fused = "self_attn.qkv_proj",
     .label = "q, k, v input",
     .attention = true,
     .online = true},
    {.site = Site::kQueryKey,
     .name = "query_key",
     .writers = kQueryKey,
     .opposite = kQ,
     .point = "self_attn.k_cache_quant",
     .label = "K cache",
     .attention = true,
     .cache = true,
     .online = true},
    {.site = Site::kValue,
     .name = "value",
     .writers = kValue,
     .readers = kHeads,
     .point = "self_attn.v_cache_quant",
     .label = "V cache",
     .attention = true,
     .cache = true},
    {.site = Site::kO,
     .name = "o",
     .readers = kHeads,
     .point = "self_attn.o_proj.input_quant",
     .label = "o_proj input",
     .attention = true,
     .online = true},
    {.site = Site::kGateUp,
     .name = "gate_up",
     .readers = kGateUp,
     .norm = "post_attention_layernorm",
     .point = "mlp.input_quant",
     .fused = "mlp.gate_up_proj",
     .label = "gate, up input",
     .online = true},
    {.site = Site::kDown,
     .name = "down",
     .writers = kGateUp,
     .readers = kGated,
     .permuted = kGate,
     .point = "mlp.down_proj.input_quant",
     .label = "down_proj input",
     .online = true},
};

/// Whether T is block-diagonal with a block per head of `dim` features.
bool within_heads(const Factor& factor, int64_t dim) {
  switch (factor.kind) {
    case Factor::Kind::kScale:
      return true;
    case Factor::Kind::kHadamard:
      return dim % hadamard_block_size(factor.block) == 0;
    case Factor::Kind::kMatrix:
      return dim % factor.left.size(1) == 0;
    case Factor::Kind::kKronecker:
      return dim % factor.size() == 0;
    case Factor::Kind::kPermutation: {
      const Tensor from = at::arange(factor.size(), factor.left.options());
      return at::equal(at::floor_divide(factor.left, dim), at::floor_divide(from, dim));
    }
  }
  TORCH_INTERNAL_ASSERT(false, "unknown Factor::Kind");
}

bool contains(Names names, std::string_view name) { return std::find(names.begin(), names.end(), name) != names.end(); }

bool rows_are_equal(const Tensor& matrix) { return at::equal(matrix, matrix.narrow(0, 0, 1).expand_as(matrix)); }

bool absorbed_by_query_and_key(const Factor& factor, const ModelConfig& config, int64_t block) {
  const int64_t dim = config.head_dim;
  const bool scale = factor.kind == Factor::Kind::kScale, permutation = factor.kind == Factor::Kind::kPermutation;
  if (!within_heads(factor, dim)) return false;
  if (config.blocks.at(static_cast<size_t>(block)).rope) {
    if (!scale) return false;
    // The two features of a pair are half the turning part apart; features behind that part have no partner.
    const int64_t half = rotary_dim(config.rope, dim) / 2;
    const Tensor heads = factor.left.view({-1, dim});
    if (!at::equal(heads.narrow(1, 0, half), heads.narrow(1, half, half))) return false;
  }
  if (!config.qk_norm) return true;
  // One weight [head_dim] serves all heads, and a norm takes back what the rows of its linear were scaled by.
  if (scale) return rows_are_equal(factor.left.view({-1, dim}));
  return permutation && rows_are_equal(at::remainder(factor.left, dim).view({-1, dim}));
}

}  // namespace

std::span<const SiteInfo> sites() { return kSites; }

const SiteInfo& site_info(Site site) { return kSites[static_cast<size_t>(site)]; }

Site input_site(std::string_view linear) {
  for (const SiteInfo& info : kSites) {
    if (info.is_input() && (linear == info.fused || contains(info.readers, linear))) return info.site;
  }
  TORCH_CHECK(false, "input_site: ", std::string(linear), " is no linear of a block");
}

bool writes_cache(std::string_view linear) {
  return std::any_of(std::begin(kSites), std::end(kSites), [&](const SiteInfo& info) {
    return info.cache && linear != info.opposite && contains(info.writers, linear);
  });
}

SiteShape site_shape(Site site, const ModelConfig& config) {
  switch (site) {
    case Site::kResidual:
    case Site::kQkv:
    case Site::kGateUp:
      return {1, config.hidden_size};
    case Site::kQueryKey:
    case Site::kValue:
      return {config.num_key_value_heads, config.num_key_value_heads * config.head_dim};
    case Site::kO:
      return {1, config.num_attention_heads * config.head_dim};
    case Site::kDown:
      return {1, config.intermediate_size};
  }
  TORCH_INTERNAL_ASSERT(false, "unknown Site");
}

bool absorbed(Site site, const Factor& factor, const ModelConfig& config, int64_t block) {
  TORCH_CHECK(factor.size() == site_shape(site, config).features, "absorbed: a factor of size ", factor.size(), " at ",
              std::string(site_info(site).name), ", which has ", site_shape(site, config).features, " features");
  const bool scale = factor.kind == Factor::Kind::kScale;
  switch (site) {
    case Site::kResidual:
      return factor.orthogonal();
    case Site::kQkv:
    case Site::kGateUp:
      return scale;
    case Site::kQueryKey:
      return absorbed_by_query_and_key(factor, config, block);
    case Site::kValue:
      return within_heads(factor, config.head_dim);
    case Site::kO:
      return false;
    case Site::kDown:
      return scale || factor.kind == Factor::Kind::kPermutation;
  }
  TORCH_INTERNAL_ASSERT(false, "unknown Site");
}

}  // namespace baseq
