#include "baseq/model/model.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <unordered_set>

#include "baseq/model/decoder.h"
#include "io/dtype_name.h"
#include "model/named_tensors.h"
#include "prepared_block.h"
#include "quantized_linear.h"

namespace baseq {
namespace {

constexpr const char* kTable = "model.embed_tokens";

/// More missing names than this are counted, not listed.
constexpr size_t kMaxListedNames = 20;

void expect_shape(const Tensor& tensor, at::IntArrayRef shape, const std::string& name) {
  TORCH_CHECK(tensor.sizes() == shape, name, ": shape is ", tensor.sizes(), " but config.json says ", shape);
}

/// A hint for a checkpoint that lacks weights because another tool packed them.
std::string packed_elsewhere(const Checkpoint& checkpoint) {
  for (const std::string& name : checkpoint.names()) {
    for (const char* ending : {".qweight", ".weight_packed", ".weight_scale_inv", ".SCB"}) {
      if (name.ends_with(ending)) {
        return fmt::format("; \"{}\" looks like the work of another quantizer: use the original checkpoint", name);
      }
    }
  }
  return "";
}

}  // namespace

std::vector<LinearShape> linear_shapes(const ModelConfig& config) {
  const int64_t hidden = config.hidden_size, ffn = config.intermediate_size;
  const int64_t q = config.num_attention_heads * config.head_dim, kv = config.num_key_value_heads * config.head_dim;
  return {
      {"self_attn.q_proj", q, hidden, config.attention_bias},  {"self_attn.k_proj", kv, hidden, config.attention_bias},
      {"self_attn.v_proj", kv, hidden, config.attention_bias}, {"self_attn.o_proj", hidden, q, config.o_bias},
      {"mlp.gate_proj", ffn, hidden, config.mlp_bias},         {"mlp.up_proj", ffn, hidden, config.mlp_bias},
      {"mlp.down_proj", hidden, ffn, config.mlp_bias}};
}

LinearShape linear_shape(const ModelConfig& config, std::string_view name) {
  for (const LinearShape& shape : linear_shapes(config)) {
    if (shape.name == name) return shape;
  }
  TORCH_CHECK(false, "linear: ", std::string(name), " is none of a block");
}

std::vector<NormShape> norm_shapes(const ModelConfig& config) {
  std::vector<NormShape> shapes = {{"input_layernorm", config.hidden_size},
                                   {"post_attention_layernorm", config.hidden_size}};
  if (config.qk_norm) {
    shapes.push_back({"self_attn.q_norm", config.head_dim});
    shapes.push_back({"self_attn.k_norm", config.head_dim});
  }
  return shapes;
}

void for_each_tensor(const ModelConfig& config,
                     const std::function<void(const std::string& name, at::IntArrayRef shape)>& fn) {
  fn("model.embed_tokens.weight", {config.vocab_size, config.hidden_size});
  fn("model.norm.weight", {config.hidden_size});
  if (!config.tie_word_embeddings) fn("lm_head.weight", {config.vocab_size, config.hidden_size});
  const std::vector<NormShape> norms = norm_shapes(config);
  const std::vector<LinearShape> linears = linear_shapes(config);
  for (int64_t block = 0; block < config.num_hidden_layers; ++block) {
    const std::string prefix = layer_prefix(block);
    for (const NormShape& norm : norms) fn(prefix + norm.name + ".weight", {norm.features});
    for (const LinearShape& linear : linears) {
      fn(prefix + linear.name + ".weight", {linear.out_features, linear.in_features});
      if (linear.bias) fn(prefix + linear.name + ".bias", {linear.out_features});
    }
  }
}

std::string layer_prefix(int64_t index) { return fmt::format("model.layers.{}.", index); }

Model::Model(StoredModel stored, const Options& options)
    : stored_(std::move(stored)),
      options_(options),
      // A quantized checkpoint holds the seven linears under LlamaForCausalLM's names whatever the original had.
      tensors_(std::make_shared<const NamedTensors>(
          stored_.tensors, stored_.config, /*fused=*/stored_.config.fused_projections && !stored_.quantization)) {
  check_tensors();
}

void Model::for_each_name(const std::function<void(const std::string& name, bool required)>& fn) const {
  constexpr std::string_view kWeight = ".weight";
  for_each_tensor(config(), [&](const std::string& name, at::IntArrayRef) {
    const LinearFormat& stored = format(name.substr(0, name.size() - std::min(name.size(), kWeight.size())));
    if (!name.ends_with(kWeight) || !stored.weights) return fn(name, true);
    const std::string linear = name.substr(0, name.size() - kWeight.size());
    for (const std::string& part : quantized_weight_names(linear, stored)) fn(part, true);
    // Some tools store zero points of symmetric grids and the order of columns that are in order.
    for (const char* part : {".weight_shape", ".weight_zero_point", ".weight_g_idx"}) fn(linear + part, false);
  });
  if (!quantization()) return;
  for (const auto& [place, transform] : stored_.online) {
    for (const std::string& name : transform.names) fn(name, false);
  }
  std::vector<std::string> points;
  DecoderLayer{}.for_each_quant_point([&](const std::string& name, const QuantPoint&) { points.push_back(name); });
  for (int64_t i = 0; i < config().num_hidden_layers; ++i) {
    for (const std::string& point : points) {
      for (const char* part : {".clip", ".gain", ".shift"}) fn(layer_prefix(i) + point + part, false);
    }
    for (const LinearShape& linear : linear_shapes(config())) {
      const std::string name = layer_prefix(i) + linear.name;
      if (!linear.bias) fn(name + ".bias", false);
      if (const auto& input = format(name).input_activations; input && !input->dynamic) {
        for (const char* part : {".input_scale", ".input_zero_point"}) fn(name + part, false);
      }
      if (!format(name).weights || quantization()->lora_rank == 0) continue;
      for (const char* part : {".lora_A", ".lora_B"}) fn(name + part, true);
      for (const char* part : {".lora_A_scale", ".lora_B_scale"}) fn(name + part, false);
    }
  }
}

std::vector<std::string> Model::unused_names() const {
  std::unordered_set<std::string> used;
  for_each_name([&](const std::string& name, bool) {
    std::string stored = tensors_->stored_name(name);
    if (checkpoint().contains(stored)) used.insert(std::move(stored));
  });
  std::vector<std::string> unused = checkpoint().names();
  std::erase_if(unused, [&](const std::string& name) { return used.contains(name); });
  return unused;
}

void Model::check_tensors() const {
  std::vector<std::string> missing;
  for_each_name([&](const std::string& name, bool required) {
    if (!required || tensors_->contains(name)) return;
    const std::string stored = tensors_->stored_name(name);
    if (missing.empty() || missing.back() != stored) missing.push_back(stored);  // the parts of a fused one in turn
  });
  const size_t listed = std::min(missing.size(), kMaxListedNames);
  TORCH_CHECK(missing.empty(), checkpoint().path().string(), ": ", missing.size(),
              " tensors are missing: ", fmt::format("{}", fmt::join(missing.begin(), missing.begin() + listed, ", ")),
              listed < missing.size() ? ", ..." : "", quantization() ? "" : packed_elsewhere(checkpoint()));
}

Tensor Model::read(const std::string& name, OptionalType dtype) const {
  // Views of the mapped file become memory of their own even when no conversion is due.
  const Tensor stored = tensors_->tensor(name);
  const at::ScalarType type = dtype.value_or(at::promote_types(stored.scalar_type(), at::kFloat));
  // As stored to another device, where the conversion costs less than its bytes on the way.
  if (!options_.device.is_cpu()) return stored.to(options_.device).to(type);
  return stored.to(type, /*non_blocking=*/false, /*copy=*/true);
}

Tensor Model::embedding() const {
  Tensor weight = read_linear(kTable, /*with_bias=*/false, options_.dtype, Weights::kFloat).weight;
  expect_shape(weight, {config().vocab_size, config().hidden_size}, "model.embed_tokens.weight");
  return weight;
}

Tensor Model::embed(const Tensor& input_ids) const {
  TORCH_CHECK(at::isIntegralType(input_ids.scalar_type(), /*includeBool=*/false), "embed: token ids are ",
              input_ids.toString(), ", expected integers");
  const Tensor ids = input_ids.to(at::kLong);
  TORCH_CHECK(ids.numel() == 0 || (ids.min().item<int64_t>() >= 0 && ids.max().item<int64_t>() < config().vocab_size),
              "embed: token ids run from ", ids.min().item<int64_t>(), " to ", ids.max().item<int64_t>(),
              " but the model knows 0 to ", config().vocab_size - 1);
  const Tensor rows = embedding_rows(ids).to(options_.device, options_.dtype);
  return config().embedding_multiplier == 1 ? rows : rows * config().embedding_multiplier;
}

/// As stored: the table is never converted or unpacked as a whole.
Tensor Model::embedding_rows(const Tensor& ids) const {
  const std::string name = std::string(kTable) + ".weight";
  const LinearFormat& stored = format(kTable);
  if (!stored.weights) {
    const Tensor table = tensors_->tensor(name);
    expect_shape(table, {config().vocab_size, config().hidden_size}, name);
    return at::embedding(table, ids);
  }
  const Tensor shape = checkpoint().tensor(name + "_shape");
  TORCH_CHECK(at::equal(shape.to(at::kLong), at::tensor({config().vocab_size, config().hidden_size}, at::kLong)), name,
              "_shape: is ", shape, " but config.json says ", config().vocab_size, ", ", config().hidden_size);
  std::vector<int64_t> sizes = ids.sizes().vec();
  sizes.push_back(config().hidden_size);
  return read_quantized_rows(checkpoint(), kTable, stored, ids.flatten().cpu()).view(sizes);
}

Linear Model::read_linear(const std::string& name, bool with_bias, OptionalType dtype, Weights weights) const {
  Linear linear;
  // Corrections put biases where the original has none; one that an original does not promise is not the model's.
  if (with_bias || (quantization() && tensors_->contains(name + ".bias"))) linear.bias = read(name + ".bias", dtype);
  const LinearFormat& stored = format(name);
  if (!stored.weights) {
    linear.weight = read(name + ".weight", dtype);
    return linear;
  }
  Linear quantized = read_quantized_weight(checkpoint(), name, stored, weights == Weights::kFloat);
  linear.quantized = std::move(quantized.quantized);
  // Corrections stand next to the linears of blocks alone.
  if (quantization()->lora_rank == 0 || !name.starts_with("model.layers.")) {
    if (quantized.weight.defined()) linear.weight = quantized.weight.to(options_.device, options_.dtype);
    return linear;
  }
  const Tensor& sized = linear.quantized ? linear.quantized->codes : quantized.weight;
  const int64_t rows = sized.size(0), columns = sized.size(1);
  const int64_t rank = std::min({quantization()->lora_rank, rows, columns});
  const auto read_factor = [&](const std::string& part, at::IntArrayRef sizes, at::IntArrayRef scale_sizes,
                               Tensor& values, Tensor& scale) {
    values = checkpoint().tensor(part);
    expect_shape(values, sizes, part);
    TORCH_CHECK(values.is_floating_point() || values.scalar_type() == at::kChar, part, ": dtype is ",
                dtype_name(values.scalar_type()), ", expected a floating type or I8");
    if (values.scalar_type() != at::kChar) return;
    scale = checkpoint().tensor(part + "_scale").to(at::kFloat);
    expect_shape(scale, scale_sizes, part + "_scale");
  };
  read_factor(name + ".lora_A", {rank, columns}, {rank, 1}, linear.lora.A, linear.lora.A_scale);
  read_factor(name + ".lora_B", {rows, rank}, {1, rank}, linear.lora.B, linear.lora.B_scale);
  if (weights == Weights::kFloat || !linear.quantized)
    linear.weight = linear.dequantized().to(options_.device, options_.dtype);
  return linear;
}

const LinearFormat& Model::format(const std::string& name) const {
  static const LinearFormat full_precision;
  const auto it = stored_.linears.find(name);
  return it == stored_.linears.end() ? full_precision : it->second;
}

void Model::read_quant_point(const std::string& name, QuantPoint& point) const {
  const auto optional = [&](const char* field) {
    return checkpoint().contains(name + field) ? read(name + field) : Tensor{};
  };
  point.clip = optional(".clip");
  point.gain = optional(".gain");
  point.shift = optional(".shift");
}

void Model::read_input_points(const std::string& prefix, DecoderLayer& layer) const {
  for (const SiteInfo& info : sites()) {
    if (!info.is_input()) continue;
    QuantPoint& point = layer.point(info.site);
    std::vector<std::string> names;
    for (const std::string_view reader : info.readers) names.push_back(prefix + std::string(reader));
    const auto& spec = format(names[0]).input_activations;
    for (const std::string& name : names) {
      TORCH_CHECK(format(name).input_activations == spec, (checkpoint().path() / "config.json").string(), ": ", name,
                  " and ", names[0], " read the same input but quantize it differently, which is not supported");
    }
    point.enabled = spec.has_value();
    if (!spec) continue;
    point.spec = *spec;
    if (spec->dynamic) continue;
    point.qparams = read_input_scale(checkpoint(), names, *spec);
    for (Tensor* part : {&point.qparams.scale, &point.qparams.zero_point}) {
      if (part->defined()) *part = part->to(options_.device, options_.dtype);
    }
  }
}

Linear Model::linear(int64_t index, const std::string& name) const {
  return read_linear(index, name, options_.dtype, Weights::kFloat);
}

Linear Model::read_linear(int64_t index, const std::string& name, OptionalType dtype, Weights weights) const {
  const LinearShape shape = linear_shape(config(), name);
  const std::string full_name = layer_prefix(index) + name;
  Linear linear = read_linear(full_name, shape.bias, dtype, weights);
  expect_shape(linear.weight.defined() ? linear.weight : linear.quantized->codes,
               {shape.out_features, shape.in_features}, full_name + ".weight");
  if (linear.bias.defined()) expect_shape(linear.bias, {shape.out_features}, full_name + ".bias");
  return linear;
}

std::vector<Factor::Kind> Model::online_kinds(int64_t block, Site site) const {
  const auto it = stored_.online.find({block, site});
  return it == stored_.online.end() ? std::vector<Factor::Kind>{} : it->second.kinds;
}

Transform Model::online_transform(int64_t block, Site site) const {
  const auto it = stored_.online.find({block, site});
  if (it == stored_.online.end()) return {};
  Transform transform = it->second.read();
  for (Factor& factor : transform) {
    factor = factor.to(at::TensorOptions().dtype(options_.dtype).device(options_.device));
  }
  return transform;
}

DecoderLayer Model::layer(int64_t index) const { return read_layer(index, options_.dtype); }

bool Model::runs_integers(const LoadOptions& options) const {
  if (options.arithmetic == Arithmetic::kFloat || options_.dtype != at::kFloat || !options_.device.is_cpu())
    return false;
  // A checkpoint that is only rotated holds matrices in full precision.
  return (quantization() && quantization()->kv_cache) || std::ranges::any_of(stored_.linears, [](const auto& linear) {
           return linear.second.weights || linear.second.input_activations;
         });
}

DecoderLayer Model::layer(int64_t index, const LoadOptions& options) const {
  if (!runs_integers(options)) return layer(index);
  DecoderLayer layer = read_layer(index, options_.dtype, Weights::kCodes);
  layer.prepare(options.activation_bits);
  return layer;
}

Decoder Model::load(const LoadOptions& options) const { return {*this, options}; }

DecoderLayer Model::stored_layer(int64_t index) const {
  TORCH_CHECK(!quantization(), "stored_layer: the model is quantized");
  return read_layer(index, std::nullopt);
}

DecoderLayer Model::read_layer(int64_t index, OptionalType dtype, Weights weights) const {
  TORCH_CHECK(index >= 0 && index < config().num_hidden_layers, "layer: index ", index, " but the model has ",
              config().num_hidden_layers, " layers");
  const std::string prefix = layer_prefix(index);
  DecoderLayer layer = DecoderLayer::create(config(), index);
  for (const auto& [name, features] : norm_shapes(config())) {
    const std::string stored = prefix + name + ".weight";
    Tensor& weight = layer.norm(name).weight;
    weight = read(stored, dtype);
    expect_shape(weight, {features}, stored);
  }
  layer.for_each_linear(
      [&](const std::string& name, Linear& target) { target = read_linear(index, name, dtype, weights); });
  for (const SiteInfo& info : sites()) {
    if (info.online) layer.transform(info.site) = online_transform(index, info.site);
  }
  checkpoint().release_pages();
  if (!quantization()) return layer;

  layer.for_each_quant_point([&](const std::string& name, QuantPoint& point) {
    read_quant_point(prefix + name, point);
    // Biases add the input points' shifts back, o's input that of the value cache; softmax does not see K's.
    point.add_shift_back = false;
  });
  read_input_points(prefix, layer);
  for (const auto& [site, smooth] : quantization()->runtime) layer.point(site).runtime = smooth;
  for (const SiteInfo& info : sites()) {
    if (!info.cache || !quantization()->kv_cache) continue;
    layer.point(info.site).enabled = true;
    layer.point(info.site).spec = *quantization()->kv_cache;
  }
  return layer;
}

RmsNorm Model::final_norm(const LoadOptions& options) const {
  RmsNorm norm{.weight = read("model.norm.weight"), .eps = config().rms_norm_eps, .exact = runs_integers(options)};
  expect_shape(norm.weight, {config().hidden_size}, "model.norm.weight");
  return norm;
}

Linear Model::lm_head(const LoadOptions& options) const {
  const bool integers = runs_integers(options), scaled = config().logits_scaling != 1;
  const std::string name = config().tie_word_embeddings ? kTable : "lm_head";
  Linear head;
  if (integers && !scaled && !format(name).weights) {
    head.weight = tensors_->tensor(name + ".weight");  // panels keep its dtype
  } else {
    head =
        read_linear(name, /*with_bias=*/false, options_.dtype, integers && !scaled ? Weights::kCodes : Weights::kFloat);
  }
  const Tensor& sized = head.weight.defined() ? head.weight : head.quantized->codes;
  expect_shape(sized, {config().vocab_size, config().hidden_size}, name + ".weight");
  if (scaled) {
    head.weight.div_(config().logits_scaling);
    head.quantized.reset();
  }
  if (integers) prepare_linears(std::array{&head}, /*from_codes=*/true, options.activation_bits);
  return head;
}

RotaryEmbedding Model::rotary(int64_t seq_len) const {
  return RotaryEmbedding::create(config(), seq_len, at::TensorOptions().dtype(options_.dtype).device(options_.device));
}

Tensor Model::logits(const Tensor& input_ids) const {
  TORCH_CHECK(input_ids.dim() == 2, "logits: token ids are of size ", input_ids.sizes(), ", expected [batch, seq]");
  const c10::NoGradGuard no_grad;
  Tensor hidden = embed(input_ids);
  const RotaryEmbedding rope = rotary(input_ids.size(1));
  for (int64_t i = 0; i < config().num_hidden_layers; ++i) hidden = layer(i).forward(hidden, rope);
  return lm_head().forward(final_norm().forward(hidden));
}

}  // namespace baseq
