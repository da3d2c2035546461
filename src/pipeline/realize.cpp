#include "realize.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <utility>

namespace baseq {
namespace {

using Kind = Factor::Kind;

/// At query_key a factor that is not a scale has the size of one head, acts on all heads alike, and runs online.
bool is_merged(Site site, const Factor& factor, const BlockPlace& place) {
  if (site == Site::kQueryKey && factor.kind != Kind::kScale) return false;
  return absorbed(site, factor, place.config, place.block);
}

SplitTransform split(const SiteInfo& info, const Transform& whole, const BlockPlace& place) {
  SplitTransform parts{.whole = whole};
  for (const Factor& factor : whole) {
    const bool merged = parts.online.empty() && is_merged(info.site, factor, place);
    (merged ? parts.merged : parts.online).push_back(factor);
  }
  const bool fits =
      info.site != Site::kQueryKey || std::all_of(parts.online.begin(), parts.online.end(),
                                                  [&](const Factor& f) { return f.size() == place.config.head_dim; });
  TORCH_CHECK(fits && (parts.online.empty() || info.online), "block ", place.block, ": the weights around the site ",
              std::string(info.name), " cannot take its transform, and it cannot run online there");
  if (info.is_input() && !parts.online.empty() && parts.online.back().kind == Kind::kScale) {
    parts.gain = parts.online.back().left;
    parts.online.pop_back();
  }
  return parts;
}

/// One transform that acts on the rows (outputs) or columns (inputs) of a linear.
struct Action {
  Site site;
  bool rows = false;
  Transform transform;
};

bool contains(std::span<const std::string_view> names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

/// The part of the merged prefix that the rows of a writer take.
Transform rows_of(const SiteInfo& info, std::string_view writer, const Transform& merged) {
  if (writer != info.permuted) return merged;
  Transform permutations;
  std::copy_if(merged.begin(), merged.end(), std::back_inserter(permutations),
               [](const Factor& factor) { return factor.kind == Kind::kPermutation; });
  return permutations;
}

/// In the order in which they act.
std::vector<Action> actions_on(std::string_view name, const DecoderLayer& layer, const SplitTransforms& transforms) {
  std::vector<Action> actions;
  const auto add = [&](Site site, bool rows, const Transform& transform) {
    if (!transform.empty()) actions.push_back({site, rows, transform});
  };
  for (const auto& [site, parts] : transforms) {
    const SiteInfo& info = site_info(site);
    const bool in_norms = site == Site::kQueryKey && layer.self_attn.q_norm.weight.defined();
    if (contains(info.writers, name) && !in_norms) add(site, /*rows=*/true, rows_of(info, name, parts.merged));
    if (contains(info.readers, name)) add(site, /*rows=*/false, parts.whole);
  }
  return actions;
}

/// Takes the part of the actions out of which everything is a Hadamard factor or comes after one.
std::vector<Action> take_hadamards(std::vector<Action>& actions) {
  std::vector<Action> later;
  bool columns_wait = false;
  for (Action& action : actions) {
    Transform& transform = action.transform;
    auto first = std::find_if(transform.begin(), transform.end(),
                              [](const Factor& factor) { return factor.kind == Kind::kHadamard; });
    if (columns_wait && !action.rows) first = transform.begin();
    if (first == transform.end()) continue;
    later.push_back({action.site, action.rows, Transform(first, transform.end())});
    transform.erase(first, transform.end());
    columns_wait = columns_wait || !action.rows;
  }
  return later;
}

/// Heads of one key/value head share its values, so each of them reads T^-T of it.
void act_on_heads(const Action& action, Linear& linear, const Attention& attention) {
  const int64_t kv = attention.num_kv_heads, dim = attention.head_dim;
  Tensor& w = linear.weight;
  // The matrix of each head, from the rows of an identity in every head.
  const Tensor identity = at::eye(dim, w.options()).repeat({1, kv});
  const auto matrices = [&](const Tensor& rows) { return rows.view({dim, kv, dim}).transpose(0, 1); };
  if (action.rows) {
    const Tensor t = matrices(apply_transform(action.transform, identity));
    w = at::matmul(t.transpose(1, 2), w.reshape({kv, dim, -1})).reshape(w.sizes());
    if (Tensor& bias = linear.bias; bias.defined()) bias = at::matmul(bias.view({kv, 1, dim}), t).reshape({kv * dim});
    return;
  }
  const Tensor t = matrices(apply_inverse_transpose(action.transform, identity));
  const Tensor heads = w.reshape({w.size(0), kv, -1, dim}).permute({1, 2, 0, 3});  // [kv, group, out, dim]
  w = at::matmul(heads, t.unsqueeze(1)).permute({2, 0, 1, 3}).reshape(w.sizes());
}

/// Scales of k in its rows, and their inverses in the rows of every query head that reads that key head.
void scale_query_or_key(const Action& action, std::string_view name, Linear& linear, const Attention& attention) {
  const int64_t kv = attention.num_kv_heads, dim = attention.head_dim;
  const Tensor ones = at::ones({kv * dim}, linear.weight.options());
  Tensor scale;
  if (name == site_info(action.site).opposite) {
    scale = apply_inverse_transpose(action.transform, ones).view({kv, 1, dim});
    scale = scale.expand({kv, attention.num_heads / kv, dim}).reshape({-1});
  } else {
    scale = apply_transform(action.transform, ones);
  }
  linear.weight = linear.weight * scale.unsqueeze(1);
  if (linear.bias.defined()) linear.bias = linear.bias * scale;
}

void act(const Action& action, std::string_view name, Linear& linear, const Attention& attention) {
  if (action.transform.empty()) return;
  if (action.site == Site::kValue) {
    act_on_heads(action, linear, attention);
  } else if (action.site == Site::kQueryKey) {
    scale_query_or_key(action, name, linear, attention);
  } else if (action.rows) {
    linear.weight = apply_transform(action.transform, linear.weight.t()).t();
    if (linear.bias.defined()) linear.bias = apply_transform(action.transform, linear.bias);
  } else {
    linear.weight = apply_inverse_transpose(action.transform, linear.weight);
  }
}

/// A norm on q and k takes back a scale of its input: the scale, which is the same for all heads, goes into its weight.
void scale_norms(DecoderLayer& layer, const Transform& merged) {
  Attention& attention = layer.self_attn;
  for (const Factor& factor : merged) {
    const auto of_head = [&](const Tensor& scale) {
      return scale.narrow(0, 0, attention.head_dim).to(attention.k_norm.weight.options());
    };
    attention.k_norm.weight = attention.k_norm.weight * of_head(factor.left);
    attention.q_norm.weight = attention.q_norm.weight * of_head(factor.left_inverse);
  }
}

Tensor realize_norm(Site site, const DecoderLayer& original, const Transform& merged, const BlockState& state) {
  const Tensor weight = apply_transform(merged, original.norm(site).weight);
  const auto it = state.norms.find(site);
  return it == state.norms.end() ? weight : weight * it->second;
}

QuantPoint realize_point(const SiteInfo& info, const BlockState& state, const Tensor& scale, const BlockPlace& place) {
  const auto it = state.points.find(info.site);
  QuantPoint point = it == state.points.end() ? QuantPoint{} : it->second;
  if (!scale.defined()) return point;
  const Tensor gain = scale.to(place.compute);
  point.gain = point.gain.defined() ? gain * point.gain : gain;
  return point;
}

}  // namespace

SplitTransforms split_transforms(const BlockState& state, const BlockPlace& place) {
  SplitTransforms transforms;
  for (const SiteInfo& info : sites()) {
    const auto it = state.transforms.find(info.site);
    transforms[info.site] = it == state.transforms.end() ? SplitTransform{} : split(info, it->second, place);
  }
  return transforms;
}

void realize_points(DecoderLayer& layer, const SplitTransforms& transforms, const BlockState& state,
                    const BlockPlace& place) {
  for (const auto& [site, parts] : transforms) {
    const SiteInfo& info = site_info(site);
    if (!info.point.empty()) layer.point(site) = realize_point(info, state, parts.gain, place);
  }
}

void realize_sites(DecoderLayer& layer, const DecoderLayer& original, const SplitTransforms& transforms,
                   const BlockState& state, const BlockPlace& place) {
  layer.self_attn.q_norm.weight = original.self_attn.q_norm.weight;
  layer.self_attn.k_norm.weight = original.self_attn.k_norm.weight;
  for (const auto& [site, parts] : transforms) {
    const SiteInfo& info = site_info(site);
    if (!info.norm.empty()) layer.norm(site).weight = realize_norm(site, original, parts.merged, state);
    if (site == Site::kQueryKey && original.self_attn.q_norm.weight.defined()) scale_norms(layer, parts.merged);
    if (info.online) layer.transform(site) = parts.online;
  }
  realize_points(layer, transforms, state, place);
}

Linear realize_linear(const DecoderLayer& original, std::string_view name, const SplitTransforms& transforms,
                      const BlockPlace& place, at::ScalarType sums) {
  Linear linear = original.linear(name);
  std::vector<Action> actions = actions_on(name, original, transforms);
  const std::vector<Action> hadamards = take_hadamards(actions);
  for (const Action& action : actions) act(action, name, linear, original.self_attn);
  if (!hadamards.empty()) {
    linear.weight = linear.weight.to(sums);
    if (linear.bias.defined()) linear.bias = linear.bias.to(sums);
    for (const Action& action : hadamards) act(action, name, linear, original.self_attn);
  }
  linear.weight = linear.weight.to(place.compute).contiguous();
  if (linear.bias.defined()) linear.bias = linear.bias.to(place.compute);
  return linear;
}

void round_linear(Linear& linear, const WeightState& weight, const BlockPlace& place) {
  linear.quantized = weight.codes;
  linear.lora = weight.low_rank;
  linear.weight = linear.dequantized().to(place.compute);
}

DecoderLayer realize(DecoderLayer original, const BlockState& state, const BlockPlace& place) {
  const SplitTransforms transforms = split_transforms(state, place);
  DecoderLayer layer = original;
  realize_sites(layer, original, transforms, state, place);
  layer.for_each_linear([&](const std::string& name, Linear& linear) {
    linear = {};
    linear = realize_linear(original, name, transforms, place, at::kDouble);
    original.linear(name) = {};
    const auto it = state.weights.find(name);
    if (it == state.weights.end()) return;
    linear.weight = it->second.before_rounding(linear.weight);
    if (it->second.codes) round_linear(linear, it->second, place);
  });
  return std::move(layer).to(place.compute);
}

Tensor merged_scale(Site site, const SplitTransforms& transforms, const BlockPlace& place) {
  const int64_t features = site_shape(site, place.config).features;
  return apply_transform(transforms.at(site).merged, at::ones({features}, place.compute));
}

}  // namespace baseq
