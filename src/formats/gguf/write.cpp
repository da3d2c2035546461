#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <map>

#include "baseq/model/decoder_layer.h"
#include "baseq/quant/gptq.h"
#include "formats/export_source.h"
#include "formats/gguf/names.h"
#include "formats/gguf/tokenizer.h"
#include "io/files.h"
#include "io/hub_cache.h"
#include "io/output_file.h"

namespace baseq {
namespace {

namespace fs = std::filesystem;

constexpr const char* kWhoWrites = "export";
constexpr int64_t kColumnsPerBlock = 32;
/// By which a file is known to be ours.
constexpr const char* kVersionKey = "baseq.version";

const std::map<std::string, GgufType> kTypes = {
    {"F16", GgufType::kF16}, {"Q8_0", GgufType::kQ8_0}, {"Q4_0", GgufType::kQ4_0}, {"Q4_1", GgufType::kQ4_1}};
/// general.file_type: what most of the tensors are.
const std::map<GgufType, uint32_t> kFileTypes = {
    {GgufType::kF16, 1}, {GgufType::kQ4_0, 2}, {GgufType::kQ4_1, 3}, {GgufType::kQ8_0, 7}};

bool carries_rope(const ModelConfig& config) {
  using Type = RopeParameters::Type;
  const Type type = config.rope.type;
  if (config.rope.partial_rotary_factor != 1) return false;
  return type == Type::kDefault || type == Type::kLinear ||
         (type == Type::kLlama3 && gguf_architecture(config)->permuted);
}

void preflight(const ExportSource& source, GgufType type) {
  const QuantizationConfig& quantization = source.quantization();
  const ModelConfig& config = source.config();
  const bool blocks = type != GgufType::kF16;
  Obstacles obstacles(source, fmt::format("gguf {}", gguf_type_name(type)));
  const bool known = gguf_architecture(config) != nullptr;
  obstacles.add_if(!known, fmt::format("{} (Llama, Mistral, Qwen2 and Qwen3 can be)", config.architecture));
  obstacles.add_if(known && !carries_rope(config),
                   "rope scaling of this type (linear can be, and llama3 for Llama and Mistral)");
  obstacles.add_activations();
  if (blocks) obstacles.add_online_transforms();
  obstacles.add_if(blocks && !quantization.weights, "weights in full precision");
  obstacles.add_if(blocks && quantization.lora_rank > 0, "corrections of low rank (low_rank)");
  if (blocks && quantization.weights) {
    const QuantSpec& spec = *quantization.weights;
    const int64_t bits = type == GgufType::kQ8_0 ? 8 : 4;
    obstacles.add_if(spec.num_bits > bits, fmt::format("weights of {} bits", spec.num_bits));
    obstacles.add_if(!spec.symmetric && type != GgufType::kQ4_1, "asymmetric weights");
    obstacles.add_if(spec.strategy == Strategy::kGroup && spec.group_size % kColumnsPerBlock != 0,
                     fmt::format("groups of {}, which blocks of {} do not divide", spec.group_size, kColumnsPerBlock));
    obstacles.add_scale_dtype(at::kHalf);
    bool divides = true;
    for (const SourceLinear& linear : source.linears()) divides = divides && linear.in_features % kColumnsPerBlock == 0;
    obstacles.add_if(!divides, fmt::format("input sizes that blocks of {} do not divide", kColumnsPerBlock));
  }
  obstacles.refuse("quantize again with the recipe q4_0-gguf, or export type F16");
}

GgufMetadata metadata_of(const ExportSource& source, GgufType type) {
  const ModelConfig& config = source.config();
  GgufMetadata metadata;
  const auto size = [](int64_t value) { return static_cast<uint32_t>(value); };
  const GgufArchitecture& architecture = *gguf_architecture(config);
  const std::string prefix = std::string(architecture.name) + ".";
  metadata.add("general.architecture", std::string(architecture.name));
  metadata.add(kVersionKey, BASEQ_VERSION);
  metadata.add("general.name", model_name(source.checkpoint().path()));
  metadata.add("general.file_type", kFileTypes.at(type));
  metadata.add("general.quantization_version", uint32_t{2});
  for (const auto& [key, field, member] : kGgufSizes) {
    const bool is_context = member == &ModelConfig::max_position_embeddings;
    metadata.add(prefix + key,
                 size(is_context ? source.checkpoint().config().value(field, int64_t{2048}) : config.*member));
  }
  metadata.add(prefix + "attention.value_length", size(config.head_dim));
  metadata.add(prefix + "attention.layer_norm_rms_epsilon", static_cast<float>(config.rms_norm_eps));
  metadata.add(prefix + "rope.dimension_count", size(config.head_dim));
  metadata.add(prefix + "rope.freq_base", static_cast<float>(config.rope.theta));
  metadata.add(prefix + "vocab_size", size(config.vocab_size));
  if (config.rope.type == RopeParameters::Type::kLinear) {
    metadata.add(prefix + "rope.scaling.type", "linear");
    metadata.add(prefix + "rope.scaling.factor", static_cast<float>(config.rope.factor));
  }
  add_gguf_tokenizer(metadata, source.checkpoint(), config.vocab_size);
  return metadata;
}

/// What llama.cpp divides the frequencies by, float32 [head_dim / 2].
Tensor rope_factors(const ExportSource& source) {
  const ModelConfig& config = source.config();
  const auto inverse = [&](const RopeParameters& rope) {
    return rotary_frequencies(rope, config.head_dim, config.max_position_embeddings, 1).inverse;
  };
  return inverse({.theta = config.rope.theta}) / inverse(config.rope);
}

/// Rows of a table that are rounded at a time.
constexpr int64_t kRowsPerPiece = 4096;

/// `fn` of a few rows of the table in float32 at a time, one after the other.
template <class Fn>
Tensor by_pieces(const Tensor& table, Fn&& fn) {
  std::vector<Tensor> parts;
  for (int64_t begin = 0; begin < table.size(0); begin += kRowsPerPiece) {
    const int64_t rows = std::min(kRowsPerPiece, table.size(0) - begin);
    parts.push_back(fn(round_to_nearest(
        table.narrow(0, begin, rows).to(at::kFloat),
        {.num_bits = 8, .strategy = Strategy::kGroup, .group_size = kColumnsPerBlock, .scale_dtype = at::kHalf})));
  }
  return at::cat(parts);
}

bool is_table(const std::string& name) { return name.ends_with("embed_tokens.weight") || name == "lm_head.weight"; }

struct GgufPlan : ExportFile {
  GgufMetadata metadata;
  std::vector<GgufTensorInfo> infos;
  /// What each tensor stands for, float32 and rounded as its type rounds.
  std::vector<std::function<Tensor()>> values;
};

void check_gguf_output(const fs::path& output, bool force, int64_t num_bytes) {
  const WriteTarget target = write_target(kWhoWrites, output);
  TORCH_CHECK(target.regular, kWhoWrites, ": ", output.string(),
              " is not a regular file; a GGUF export is read back to check it");
  TORCH_CHECK(force || !path_exists(kWhoWrites, target.path), output.string(), ": exists; pass `force` to replace it");
  check_output_file(kWhoWrites, output, kVersionKey);
  check_disk_space(kWhoWrites, output, num_bytes);
}

void write_gguf(const ExportPlan& plan, const GgufPlan& gguf, const fs::path& output, bool force,
                const std::function<void(int64_t, int64_t)>& progress) {
  check_gguf_output(output, force, plan.num_bytes());
  FileWriter file(kWhoWrites, output);
  file.write(gguf_header(gguf.metadata, gguf.infos));
  const auto total = static_cast<int64_t>(plan.tensors.size());
  for (int64_t i = 0; i < total; ++i) {
    const Tensor tensor = made(plan.tensors[static_cast<size_t>(i)]).contiguous();
    const auto bytes = static_cast<int64_t>(tensor.nbytes());
    file.write(tensor.const_data_ptr(), tensor.nbytes());
    file.write(std::string(static_cast<size_t>(gguf_padded(bytes) - bytes), '\0'));
    if (progress) progress(i + 1, total);
  }
  const GgufFile written(file.temporary());
  TORCH_CHECK(written.tensors().size() == gguf.infos.size(), "export: ", output.string(), " holds ",
              written.tensors().size(), " tensors but ", gguf.infos.size(), " were planned");
  for (size_t i = 0; i < gguf.infos.size(); ++i) {
    if (progress) progress(total, total);
    const auto& [name, type, shape] = gguf.infos[i];
    const GgufFile::Entry& entry = written.tensors().at(name);
    TORCH_CHECK(entry.type == static_cast<uint32_t>(type) && entry.shape == shape, "export: ", name,
                " was not written as planned");
    expect_written(gguf_values(written, name).to(at::kFloat), gguf.values[i](), name);
    written.release_pages();
  }
  file.commit();
}

}  // namespace

ExportPlan plan_gguf(std::shared_ptr<const ExportSource> source, const std::string& type_name,
                     const std::optional<std::string>& head_type) {
  const auto it = kTypes.find(type_name);
  TORCH_CHECK(it != kTypes.end(), "export: GGUF type \"", type_name, "\" is not one of F16, Q8_0, Q4_0, Q4_1");
  const GgufType type = it->second;
  TORCH_CHECK(!head_type || *head_type == "F16" || *head_type == "Q8_0", "export: GGUF type \"", *head_type,
              "\" of embedding and head is neither F16 nor Q8_0");
  preflight(*source, type);
  const ModelConfig& config = source->config();
  const bool divides = config.hidden_size % kColumnsPerBlock == 0;
  TORCH_CHECK(divides || head_type != "Q8_0", "export: blocks of ", kColumnsPerBlock, " do not divide rows of ",
              config.hidden_size, "; embedding and head can be F16");
  const bool rounds_tables = head_type ? *head_type == "Q8_0" : type != GgufType::kF16 && divides;
  const auto gguf = std::make_shared<GgufPlan>();
  gguf->metadata = metadata_of(*source, type);

  ExportPlan plan;
  const auto add = [&](const std::string& name, GgufType of, const std::vector<int64_t>& shape,
                       std::function<Tensor()> make, std::function<Tensor()> values) {
    gguf->infos.push_back({name, of, shape});
    gguf->tensors.push_back({name, gguf_type_name(of), shape});
    gguf->values.push_back(std::move(values));
    std::vector<int64_t> stored = shape;
    stored.back() = stored.back() / gguf_block_size(of) * gguf_block_bytes(of);
    const bool floating = gguf_block_size(of) == 1;
    const at::ScalarType dtype = of == GgufType::kF32 ? at::kFloat : of == GgufType::kF16 ? at::kHalf : at::kByte;
    plan.tensors.push_back({name, dtype, floating ? shape : stored, std::move(make)});
  };
  const auto add_float = [&](const std::string& name, GgufType of, const std::vector<int64_t>& shape,
                             const std::function<Tensor()>& source_value) {
    const at::ScalarType dtype = of == GgufType::kF32 ? at::kFloat : at::kHalf;
    add(
        name, of, shape, [=] { return source_value().to(dtype); },
        [=] { return source_value().to(dtype).to(at::kFloat); });
  };
  for (const std::string& name : source->others()) {
    const std::string to = gguf_name(name);
    if (to.empty()) {
      plan.notes.push_back(fmt::format("{} has no place in the file and is left out.", name));
      continue;
    }
    const std::vector<int64_t> shape = source->other_info(name).shape;
    if (rounds_tables && is_table(name)) {
      add(
          to, GgufType::kQ8_0, shape,
          [source, name] {
            return by_pieces(source->other(name), [](const QuantizedWeight& rows) {
              return gguf_blocks(GgufType::kQ8_0, rows.codes, rows.qparams.scale, Tensor());
            });
          },
          [source, name] {
            return by_pieces(source->other(name), [](const QuantizedWeight& rows) { return rows.dequantized(); });
          });
      continue;
    }
    add_float(to, shape.size() == 1 ? GgufType::kF32 : GgufType::kF16, shape,
              [source, name] { return source->other(name); });
  }
  if (config.rope.type == RopeParameters::Type::kLlama3) {
    add_float(kRopeFactors, GgufType::kF32, {config.head_dim / 2}, [source] { return rope_factors(*source); });
  }
  const auto window = std::max_element(config.blocks.begin(), config.blocks.end(), [](const auto& a, const auto& b) {
    return a.sliding_window < b.sliding_window;
  });
  if (window->sliding_window > 0) {
    plan.notes.push_back(fmt::format(
        "llama.cpp attends to all tokens: its logits are the model's for up to {} tokens, the sliding window.",
        window->sliding_window));
  }
  for (const SourceLinear& linear : source->linears()) {
    const std::string weight_name = gguf_name(linear.full_name + ".weight");
    const std::vector<int64_t> shape = {linear.out_features, linear.in_features};
    const int64_t heads =
        permuted_heads(*gguf_architecture(config), linear.name, config.num_attention_heads, config.num_key_value_heads);
    const auto permuted = [heads](const Tensor& rows) { return permute_rows(rows, heads); };
    if (linear.bias) {
      add_float(gguf_name(linear.full_name + ".bias"), GgufType::kF32, {linear.out_features},
                [=] { return permuted(source->checkpoint().tensor(linear.full_name + ".bias").to(at::kFloat)); });
    }
    if (type == GgufType::kF16) {
      add_float(weight_name, type, shape, [=] { return permuted(source->merged_weight(linear)); });
      continue;
    }
    const auto make = [=] {
      const QuantizedWeight& weight = *source->linear(linear).quantized;
      const Tensor zero_point = weight.qparams.zero_point.defined() ? permuted(weight.qparams.zero_point) : Tensor();
      return gguf_blocks(type, permuted(weight.codes), permuted(weight.qparams.scale), zero_point);
    };
    const auto values = [=] {
      if (type != GgufType::kQ4_1) return permuted(source->linear(linear).weight);
      // The minimum of a block is rounded to float16.
      const QuantizedWeight& weight = *source->linear(linear).quantized;
      const Tensor scale = permuted(weight.qparams.scale).unsqueeze(-1);
      Tensor lowest = at::full_like(scale, -8);
      if (weight.qparams.zero_point.defined()) lowest = lowest - permuted(weight.qparams.zero_point).unsqueeze(-1);
      const Tensor codes = permuted(weight.codes).to(at::kFloat).view({linear.out_features, scale.size(1), -1});
      return ((codes + 8) * scale + (lowest * scale).to(at::kHalf).to(at::kFloat)).view(shape);
    };
    add(weight_name, type, shape, make, values);
  }
  if (type != GgufType::kF16) {
    plan.notes.push_back(
        fmt::format("Embedding and head are {}; llama.cpp also quantizes activations, to 8 bits, in its products.",
                    rounds_tables ? "Q8_0, which rounds them to 8 bits" : "F16"));
  }
  gguf->num_header_bytes = static_cast<int64_t>(gguf_header(gguf->metadata, gguf->infos).size());
  gguf->check_output = check_gguf_output;
  gguf->write = [raw = gguf.get()](const ExportPlan& written, const fs::path& output, bool force,
                                   const std::function<void(int64_t, int64_t)>& progress) {
    write_gguf(written, *raw, output, force, progress);
  };
  plan.single_file = gguf;
  return plan;
}

}  // namespace baseq
