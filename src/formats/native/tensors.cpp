#include "formats/native/tensors.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <charconv>
#include <set>
#include <unordered_map>

#include "baseq/formats/open_model.h"
#include "baseq/model/model.h"
#include "baseq/transform/hadamard.h"
#include "io/dtype_name.h"
#include "model/quantized_linear.h"

namespace baseq {
namespace {

using Kind = Factor::Kind;

constexpr std::string_view kBlocks = "model.layers.", kTransform = ".transform.";

/// A tensor of a factor.
struct Part {
  std::string_view name;
  Kind kind;
  int64_t dim;             ///< of the tensor; from two on its last two sizes are equal
  Tensor Factor::*member;  ///< null: the sizes of a Hadamard matrix
  bool inverse = false;    ///< stored where something is multiplied by it; absent: that part is orthogonal
};
constexpr Part kParts[] = {
    {"scale", Kind::kScale, 1, &Factor::left},
    {"scale_inverse", Kind::kScale, 1, &Factor::left_inverse, true},
    {"hadamard", Kind::kHadamard, 1, nullptr},
    {"matrix", Kind::kMatrix, 3, &Factor::left},
    {"matrix_inverse", Kind::kMatrix, 3, &Factor::left_inverse, true},
    {"kronecker_left", Kind::kKronecker, 2, &Factor::left},
    {"kronecker_right", Kind::kKronecker, 2, &Factor::right},
    {"kronecker_left_inverse", Kind::kKronecker, 2, &Factor::left_inverse, true},
    {"kronecker_right_inverse", Kind::kKronecker, 2, &Factor::right_inverse, true},
    {"permutation", Kind::kPermutation, 1, &Factor::left},
};

/// Queries take the inverse transpose of what keys take; nothing else is multiplied by an inverse at run time.
bool stores_inverses(Site site) { return site == Site::kQueryKey; }

std::string part_name(const std::string& prefix, Site site, size_t k, const Part& part) {
  return fmt::format("{}{}{}{}.{}", prefix, site_info(site).point, kTransform, k, part.name);
}

at::ScalarType stored_type(const Part& part) {
  return part.member == nullptr || part.kind == Kind::kPermutation ? at::kLong : at::kFloat;
}

Tensor stored_value(const Part& part, const Factor& factor) {
  const bool identity = factor.kind == Kind::kKronecker && !factor.right.defined();
  if (identity && (part.member == &Factor::right || part.member == &Factor::right_inverse)) {
    return part.inverse ? Tensor{} : at::eye(factor.block, factor.left.options());
  }
  if (part.member != nullptr) return factor.*part.member;
  const int64_t order = hadamard_block_size(factor.block);
  return at::tensor({order, factor.size() / order}, at::kLong);
}

/// The site of `point`, by the name of a tensor of its transform.
Site online_site(const std::string& name, std::string_view point) {
  std::vector<std::string_view> known;
  for (const SiteInfo& info : sites()) {
    if (!info.online) continue;
    if (info.point == point) return info.site;
    known.push_back(info.point);
  }
  TORCH_CHECK(false, name, ": ", std::string(point), " has no online transform; ",
              fmt::format("{}", fmt::join(known, ", ")), " can have one");
}

/// "3.matrix" -> 3 and the part, by the name that it ends.
std::pair<int64_t, const Part*> position_and_part(const std::string& name, std::string_view text) {
  const size_t dot = text.find('.');
  const std::string_view digits = text.substr(0, dot);
  int64_t position = 0;
  const auto parsed = std::from_chars(digits.data(), digits.data() + digits.size(), position);
  TORCH_CHECK(dot != text.npos && parsed.ec == std::errc() && position >= 0 && std::to_string(position) == digits, name,
              ": expected the position of a factor in its chain, then its kind, after \"transform\"");
  std::vector<std::string_view> known;
  for (const Part& part : kParts) {
    if (part.name == text.substr(dot + 1)) return {position, &part};
    known.push_back(part.name);
  }
  TORCH_CHECK(false, name, ": ", std::string(text.substr(dot + 1)), " is no factor that this program knows; it knows ",
              fmt::format("{}", fmt::join(known, ", ")));
}

/// The parts of the factors of one chain, by position.
using FoundParts = std::map<int64_t, std::set<const Part*>>;

std::vector<Kind> check_chain(const std::string& prefix, Site site, const FoundParts& found) {
  std::vector<Kind> kinds;
  for (const auto& [position, parts] : found) {
    const Part& first = **parts.begin();
    const size_t k = kinds.size();
    const std::string there = part_name(prefix, site, static_cast<size_t>(position), first);
    TORCH_CHECK(position == static_cast<int64_t>(k), there, ": the chain has no factor ", k, " before it");
    for (const Part* part : parts) {
      TORCH_CHECK(part->kind == first.kind, part_name(prefix, site, k, *part), ": ", there,
                  " is another kind of factor at the same position");
      TORCH_CHECK(!part->inverse || stores_inverses(site), part_name(prefix, site, k, *part), ": only ",
                  site_info(Site::kQueryKey).point, " stores inverses");
    }
    for (const Part& part : kParts) {
      TORCH_CHECK(part.kind != first.kind || part.inverse || parts.contains(&part), part_name(prefix, site, k, part),
                  " is missing, which belongs to ", there);
    }
    kinds.push_back(first.kind);
  }
  return kinds;
}

void refuse_reserved(const std::string& name, const QuantizationConfig& quantization) {
  for (const std::string_view ending : {".weight_levels", ".weight_block_scale"}) {
    TORCH_CHECK(!name.ends_with(ending), name, ": tensors of this name are reserved for a later version of the format");
  }
  if (quantization.format_version >= QuantizationConfig::kFirstWithHead) return;
  for (const std::string_view start : {"lm_head.weight_", "model.embed_tokens.weight_"}) {
    TORCH_CHECK(!name.starts_with(start), name,
                ": a quantized head or embedding is reserved for a later version of the format");
  }
}

Factor read_hadamard(const Tensor& sizes, const std::string& name, int64_t width) {
  TORCH_CHECK(sizes.scalar_type() == at::kLong && sizes.sizes() == at::IntArrayRef({2}), name, ": is ",
              dtype_name(sizes.scalar_type()), " of size ", sizes.sizes(), ", expected I64 [2]: order and count");
  const int64_t block = sizes[0].item<int64_t>(), blocks = sizes[1].item<int64_t>();
  TORCH_CHECK(block >= 1 && block <= width && width % block == 0 && blocks == width / block, name, ": ", blocks,
              " matrices of order ", block, " do not fill the ", width, " features");
  TORCH_CHECK(hadamard_block_size(block) == block, name, ": no Hadamard matrix of order ", block, " is known");
  return hadamard_factor(block, blocks);
}

Tensor read_part(const Checkpoint& checkpoint, const std::string& name, const Part& part) {
  const Tensor stored = checkpoint.tensor(name);
  const bool integers = stored_type(part) == at::kLong;
  const bool dtype = integers ? stored.scalar_type() == at::kLong : stored.is_floating_point();
  const bool square = part.dim == 1 || (stored.dim() == part.dim && stored.size(-1) == stored.size(-2));
  constexpr const char* kShapes[] = {"a vector", "a square matrix", "square matrices in three dimensions"};
  TORCH_CHECK(dtype && stored.dim() == part.dim && square && stored.numel() > 0, name, ": is ",
              dtype_name(stored.scalar_type()), " of size ", stored.sizes(), ", expected ",
              integers ? "I64" : "a floating type", ", ", kShapes[part.dim - 1]);
  // Memory of its own in place of a view of the mapped file.
  return stored.to(stored_type(part), /*non_blocking=*/false, /*copy=*/true);
}

Factor read_factor(const Checkpoint& checkpoint, const std::string& prefix, Site site, size_t k, Kind kind,
                   int64_t width) {
  Factor factor{.kind = kind};
  std::string first;  // the name of the factor's first part
  for (const Part& part : kParts) {
    const std::string name = part_name(prefix, site, k, part);
    if (part.kind != kind || (part.inverse && !checkpoint.contains(name))) continue;
    if (part.member == nullptr) return read_hadamard(checkpoint.tensor(name), name, width);
    factor.*part.member = read_part(checkpoint, name, part);
    if (first.empty()) first = name;
    const Tensor& inverted = part.member == &Factor::left_inverse ? factor.left : factor.right;
    TORCH_CHECK(!part.inverse || inverted.sizes() == (factor.*part.member).sizes(), name, ": shape is ",
                (factor.*part.member).sizes(), " but what it inverts is ", inverted.sizes());
  }
  if (kind == Kind::kKronecker && !factor.right_inverse.defined() &&
      at::equal(factor.right, at::eye(factor.right.size(0), factor.right.options()))) {
    factor.block = factor.right.size(0);  // nothing is multiplied by an identity
    factor.right = Tensor{};
  }
  TORCH_CHECK(factor.size() == width, first, ": a factor of ", factor.size(), " features at a point with ", width);
  if (kind == Kind::kPermutation) {
    const Tensor sorted = std::get<0>(factor.left.sort());
    TORCH_CHECK(at::equal(sorted, at::arange(width, at::kLong)), first, ": expected each of 0 to ", width - 1, " once");
  }
  return factor;
}

}  // namespace

OnlineKinds find_transforms(const Checkpoint& checkpoint, const ModelConfig& config,
                            const QuantizationConfig& quantization) {
  OnlineKinds kinds;
  std::unordered_map<std::string, int64_t> blocks;
  for (int64_t block = 0; block < config.num_hidden_layers; ++block) {
    blocks[layer_prefix(block)] = block;
    for (const Site site : quantization.hadamards) kinds[{block, site}] = {Kind::kHadamard};
  }
  if (quantization.format_version < QuantizationConfig::kFirstWithTransforms) return kinds;
  std::map<std::pair<int64_t, Site>, FoundParts> found;
  for (const std::string& name : checkpoint.names()) {
    refuse_reserved(name, quantization);
    const size_t end = name.find(kTransform);
    if (!name.starts_with(kBlocks) || end == name.npos) continue;
    const auto block = blocks.find(name.substr(0, name.find('.', kBlocks.size()) + 1));
    if (block == blocks.end()) continue;  // a block that the model does not have
    const size_t start = block->first.size();
    const Site site = online_site(name, std::string_view(name).substr(start, end - std::min(end, start)));
    const auto [position, part] = position_and_part(name, std::string_view(name).substr(end + kTransform.size()));
    found[{block->second, site}][position].insert(part);
  }
  for (const auto& [place, parts] : found) kinds[place] = check_chain(layer_prefix(place.first), place.second, parts);
  return kinds;
}

std::vector<std::string> transform_names(const std::string& prefix, Site site, const std::vector<Kind>& kinds) {
  std::vector<std::string> names;
  for (size_t k = 0; k < kinds.size(); ++k) {
    for (const Part& part : kParts) {
      if (part.kind == kinds[k]) names.push_back(part_name(prefix, site, k, part));
    }
  }
  return names;
}

Transform read_transform(const Checkpoint& checkpoint, const std::string& prefix, Site site,
                         const std::vector<Kind>& kinds, int64_t width) {
  Transform transform;
  for (size_t k = 0; k < kinds.size(); ++k) {
    transform.push_back(read_factor(checkpoint, prefix, site, k, kinds[k], width));
  }
  return transform;
}

std::map<std::string, Tensor> layer_tensors(const DecoderLayer& layer, const std::string& prefix,
                                            at::ScalarType dtype) {
  std::map<std::string, Tensor> tensors;
  const auto put = [&](const std::string& name, const Tensor& tensor, at::ScalarType type) {
    if (tensor.defined()) tensors[prefix + name] = tensor.detach().to(at::kCPU, type).contiguous();
  };
  put("input_layernorm.weight", layer.input_layernorm.weight, at::kFloat);
  put("post_attention_layernorm.weight", layer.post_attention_layernorm.weight, at::kFloat);
  put("self_attn.q_norm.weight", layer.self_attn.q_norm.weight, at::kFloat);
  put("self_attn.k_norm.weight", layer.self_attn.k_norm.weight, at::kFloat);
  layer.for_each_linear([&](const std::string& name, const Linear& linear) {
    put(name + ".bias", linear.bias, at::kFloat);
    if (!linear.quantized) {
      put(name + ".weight", linear.weight, dtype);
      return;
    }
    tensors.merge(quantized_weight_tensors(prefix + name, *linear.quantized));
    if (!linear.lora.defined()) return;
    put(name + ".lora_A", linear.lora.A, linear.lora.A.scalar_type());
    put(name + ".lora_B", linear.lora.B, linear.lora.B.scalar_type());
    put(name + ".lora_A_scale", linear.lora.A_scale, at::kFloat);
    put(name + ".lora_B_scale", linear.lora.B_scale, at::kFloat);
  });
  for (const SiteInfo& info : sites()) {
    if (!info.online) continue;
    const Transform& transform = layer.transform(info.site);
    for (size_t k = 0; k < transform.size(); ++k) {
      for (const Part& part : kParts) {
        if (part.kind != transform[k].kind || (part.inverse && !stores_inverses(info.site))) continue;
        put(part_name("", info.site, k, part), stored_value(part, transform[k]), stored_type(part));
      }
    }
  }
  layer.for_each_quant_point([&](const std::string& name, const QuantPoint& point) {
    put(name + ".clip", point.clip, at::kFloat);
    put(name + ".gain", point.gain, at::kFloat);
    put(name + ".shift", point.shift, at::kFloat);
  });
  return tensors;
}

}  // namespace baseq
