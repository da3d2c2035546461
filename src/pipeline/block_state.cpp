#include "block_state.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <initializer_list>
#include <utility>

namespace baseq {
namespace {

/// The tensors of a struct and their names in a journal.
template <class Struct>
using Parts = std::initializer_list<std::pair<const char*, Tensor Struct::*>>;

constexpr Parts<Factor> kFactor = {{".left", &Factor::left},
                                   {".right", &Factor::right},
                                   {".left_inverse", &Factor::left_inverse},
                                   {".right_inverse", &Factor::right_inverse}};
constexpr Parts<QuantPoint> kPoint = {
    {".clip", &QuantPoint::clip}, {".gain", &QuantPoint::gain}, {".shift", &QuantPoint::shift}};
constexpr Parts<LowRankFactors> kLowRank = {{".lora_A", &LowRankFactors::A},
                                            {".lora_B", &LowRankFactors::B},
                                            {".lora_A_scale", &LowRankFactors::A_scale},
                                            {".lora_B_scale", &LowRankFactors::B_scale}};

/// visit(name, tensor) for each of them.
template <class Struct, class Any, class Visit>
void for_each_part(const Parts<Struct>& parts, const std::string& name, Any& object, const Visit& visit) {
  for (const auto& [part, member] : parts) visit(name + part, object.*member);
}

constexpr const char* kAdded = ".added";  // in names of WeightState::added

std::string factor_key(Site site, size_t index) {
  return std::string(site_info(site).name) + ".transform." + std::to_string(index);
}

std::string norm_key(Site site) { return std::string(site_info(site).name) + ".norm"; }

std::string point_key(Site site) { return std::string(site_info(site).name) + ".point"; }

/// Of the names of the state of a later block.
std::string distance_prefix(size_t distance) { return "ahead." + std::to_string(distance) + "."; }

class Restorer {
 public:
  Restorer(const std::map<std::string, Tensor>& tensors, at::Device device) : tensors_(tensors), device_(device) {}

  bool has(const std::string& name) const { return tensors_.contains(name); }
  void operator()(const std::string& name, Tensor& tensor) const {
    const auto it = tensors_.find(name);
    // A copy: alignment in memory can decide about the last bits of a product.
    if (it != tensors_.end()) tensor = it->second.clone().to(device_);
  }
  Tensor at(const std::string& name) const {
    TORCH_CHECK(has(name), "state of a block: ", name, " is missing");
    return tensors_.at(name);
  }

 private:
  const std::map<std::string, Tensor>& tensors_;
  at::Device device_;
};

Transform restore_transform(Site site, const Restorer& restore) {
  Transform transform;
  for (size_t i = 0; restore.has(factor_key(site, i)); ++i) {
    const Tensor sizes = restore.at(factor_key(site, i));
    Factor factor{.kind = static_cast<Factor::Kind>(sizes[0].item<int64_t>()),
                  .block = sizes[1].item<int64_t>(),
                  .blocks = sizes[2].item<int64_t>()};
    for_each_part(kFactor, factor_key(site, i), factor, restore);
    transform.push_back(factor);
  }
  return transform;
}

WeightState restore_weight(const std::string& name, const Restorer& restore, const Grids& grids) {
  WeightState weight;
  restore(name + ".clip", weight.clip);
  for_each_part(kLowRank, name + kAdded, weight.added, restore);
  if (!restore.has(name + ".codes")) return weight;
  const std::optional<QuantSpec>& grid = grids.weights_of(name);
  TORCH_CHECK(grid, "state of a block: ", name, " is rounded, but the recipe gives no weight grid");
  (void)restore.at(name + ".weight_scale");
  weight.codes.emplace(QuantizedWeight{.spec = *grid, .codes = {}, .qparams = {}});
  restore(name + ".codes", weight.codes->codes);
  restore(name + ".weight_scale", weight.codes->qparams.scale);
  restore(name + ".weight_zero_point", weight.codes->qparams.zero_point);
  for_each_part(kLowRank, name, weight.low_rank, restore);
  return weight;
}

}  // namespace

Factor* find_factor(BlockState& state, Site site, Factor::Kind kind) {
  const auto it = state.transforms.find(site);
  if (it == state.transforms.end()) return nullptr;
  Transform& transform = it->second;
  const auto found =
      std::find_if(transform.rbegin(), transform.rend(), [&](const Factor& factor) { return factor.kind == kind; });
  return found == transform.rend() ? nullptr : &*found;
}

bool has_codes(const BlockState& state) {
  return std::any_of(state.weights.begin(), state.weights.end(),
                     [](const auto& weight) { return weight.second.codes.has_value(); });
}

std::map<std::string, Tensor> state_tensors(const BlockState& state) {
  std::map<std::string, Tensor> tensors;
  const auto save = [&](const std::string& name, const Tensor& tensor) {
    if (tensor.defined()) tensors[name] = tensor.detach().cpu().contiguous();
  };
  for (const auto& [site, transform] : state.transforms) {
    for (size_t i = 0; i < transform.size(); ++i) {
      const Factor& factor = transform[i];
      save(factor_key(site, i),
           at::tensor({static_cast<int64_t>(factor.kind), factor.block, factor.blocks}, at::kLong));
      for_each_part(kFactor, factor_key(site, i), factor, save);
    }
  }
  for (const auto& [site, point] : state.points) {
    save(point_key(site), at::scalar_tensor(point.add_shift_back, at::kBool));
    for_each_part(kPoint, point_key(site), point, save);
    if (point.runtime) {
      save(point_key(site) + ".runtime",
           at::tensor({point.runtime->group, static_cast<int64_t>(point.runtime->span)}, at::kLong));
    }
  }
  for (const auto& [site, factor] : state.norms) save(norm_key(site), factor);
  for (const auto& [name, weight] : state.weights) {
    save(name + ".clip", weight.clip);
    for_each_part(kLowRank, name + kAdded, weight.added, save);
    if (!weight.codes) continue;
    save(name + ".codes", weight.codes->codes);
    save(name + ".weight_scale", weight.codes->qparams.scale);
    save(name + ".weight_zero_point", weight.codes->qparams.zero_point);
    for_each_part(kLowRank, name, weight.low_rank, save);
  }
  return tensors;
}

std::map<std::string, Tensor> states_tensors(const std::vector<BlockState>& states) {
  std::map<std::string, Tensor> tensors = state_tensors(states.front());
  for (size_t distance = 1; distance < states.size(); ++distance) {
    for (auto& [name, tensor] : state_tensors(states[distance])) tensors[distance_prefix(distance) + name] = tensor;
  }
  return tensors;
}

std::map<std::string, Tensor> take_state_tensors(std::map<std::string, Tensor>& tensors, int64_t distance) {
  const std::string prefix = distance_prefix(static_cast<size_t>(distance));
  std::map<std::string, Tensor> taken;
  for (auto it = tensors.lower_bound(prefix); it != tensors.end() && it->first.starts_with(prefix);) {
    taken[it->first.substr(prefix.size())] = it->second;
    it = tensors.erase(it);
  }
  return taken;
}

BlockState state_from_tensors(const std::map<std::string, Tensor>& tensors, const Grids& grids, at::Device device) {
  const Restorer restore(tensors, device);
  BlockState state;
  for (const SiteInfo& info : sites()) {
    Transform transform = restore_transform(info.site, restore);
    if (!transform.empty()) state.transforms[info.site] = std::move(transform);
    if (restore.has(norm_key(info.site))) restore(norm_key(info.site), state.norms[info.site]);
    if (info.point.empty() || !restore.has(point_key(info.site))) continue;
    const std::optional<QuantSpec>& grid = info.cache ? grids.kv_cache : grids.input_activations;
    TORCH_CHECK(grid, "state of a block: the point at ", std::string(info.name), " is on, but the recipe has no grid");
    QuantPoint& point = state.points[info.site];
    point.enabled = true;
    point.spec = *grid;
    point.add_shift_back = restore.at(point_key(info.site)).item<bool>();
    for_each_part(kPoint, point_key(info.site), point, restore);
    if (const std::string key = point_key(info.site) + ".runtime"; restore.has(key)) {
      const Tensor runtime = restore.at(key);
      point.runtime = {.group = runtime[0].item<int64_t>(),
                       .span = static_cast<RuntimeSmooth::Span>(runtime[1].item<int64_t>())};
    }
  }
  DecoderLayer names;
  names.for_each_linear([&](const std::string& name, const Linear&) {
    WeightState weight = restore_weight(name, restore, grids);
    if (weight.codes || weight.clip.defined() || weight.added.defined()) state.weights[name] = std::move(weight);
  });
  return state;
}

}  // namespace baseq
