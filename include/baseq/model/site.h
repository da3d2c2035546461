#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "baseq/model/config.h"
#include "baseq/transform/transform.h"

#pragma GCC visibility push(default)
namespace baseq {

/// The places of a block where a transform can stand between linears, in the order in which a forward pass reaches
/// them.
enum class Site {
  kResidual,  ///< the residual stream
  kQkv,       ///< what q_proj, k_proj and v_proj read
  kQueryKey,  ///< k after its norm and RoPE, and q with the inverse transpose
  kValue,     ///< the values of the key/value heads
  kO,         ///< what o_proj reads, the concatenated heads
  kGateUp,    ///< what gate_proj and up_proj read
  kDown,      ///< what down_proj reads
};

/// What stands around a site. Linears and points have the names of DecoderLayer::for_each_linear and
/// for_each_quant_point.
///
///     for (const SiteInfo& info : sites()) std::cout << info.name << ": " << info.readers.size() << " readers\n";
struct SiteInfo {
  Site site{};
  std::string_view name{};
  std::span<const std::string_view> writers{};  ///< their rows can take a factor, see absorbed()
  std::span<const std::string_view> readers{};  ///< their columns take the inverse transpose
  /// The writer before an activation function, which lets permutations pass and nothing else; "": none.
  std::string_view permuted{};
  /// The writer whose rows take the inverse transpose, in every query head of a key/value head; "": none.
  std::string_view opposite{};
  std::string_view norm{};   ///< whose weight can take a scale; "": none
  std::string_view point{};  ///< the quant point; "": none
  std::string_view fused{};  ///< the readers as one where ModelConfig::fused_projections; "": not stored so
  std::string_view label{};  ///< the point in tables for people, such as "o_proj input"
  bool attention = false;    ///< its linears are those of attention, not of the MLP
  bool cache = false;        ///< the point quantizes the KV cache, not the input of linears
  bool online = false;       ///< what the weights do not take can be computed at run time

  /// Whether the site is what linears read and a point quantizes: kQkv, kO, kGateUp, kDown.
  bool is_input() const { return !point.empty() && !cache; }
};

/// All sites in the order of the enumerators.
std::span<const SiteInfo> sites();
const SiteInfo& site_info(Site site);
/// The site that a linear reads: kQkv, kO, kGateUp or kDown. Fused linears too. Throws c10::Error for another name.
Site input_site(std::string_view linear);
/// Whether the outputs of a linear are what the KV cache holds.
bool writes_cache(std::string_view linear);

/// Features of a site: what one head or the whole tensor has, times the key/value heads or 1.
struct SiteShape {
  int64_t blocks = 1, features = 0;

  int64_t width() const { return features / blocks; }  ///< size of the online transform, which every block has
};
SiteShape site_shape(Site site, const ModelConfig& config);

/// Whether the weights around a site of a block can take `factor` exactly, so that nothing is computed at run time:
/// - residual: orthogonal factors, once the norms' gains are in their readers;
/// - qkv, gate_up: a scale, into the norm;
/// - query_key: with RoPE a scale that is equal within every pair that turns together, without RoPE whatever stays
///   within heads; with norms on q and k only a scale or permutation that is the same in every head, into their
///   weights;
/// - value: whatever stays within key/value heads;
/// - o: nothing, `value` has what v_proj can take;
/// - down: a scale and a permutation, into up_proj and gate_proj.
/// Biases of writers turn as rows do. Throws c10::Error when the factor has another size than the site.
bool absorbed(Site site, const Factor& factor, const ModelConfig& config, int64_t block);

}  // namespace baseq
#pragma GCC visibility pop
