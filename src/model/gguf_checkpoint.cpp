#include "gguf_checkpoint.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "../io/strict_json.h"
#include "baseq/io/json_object.h"
#include "baseq/model/rotary_embedding.h"
#include "baseq/quant/gguf_blocks.h"

namespace baseq {
namespace {

using nlohmann::json;

constexpr int64_t kGroup = 32;  // of blocks with codes
constexpr int64_t kMaxDimension = int64_t{1} << 30;
constexpr const char* kRopeFactors = "rope_freqs.weight";

/// A float32 as a person would have written it: 1e-05 and not 9.99999974737875e-06.
double shortest(double value) { return std::stod(fmt::format("{}", static_cast<float>(value))); }

const GgufArchitecture& architecture_of(const GgufFile& file) {
  const std::string name = JsonObject(file.metadata(), file.name()).text("general.architecture", "");
  const auto* it = std::find_if(std::begin(kGgufArchitectures), std::end(kGgufArchitectures),
                                [&](const GgufArchitecture& known) { return known.name == name; });
  TORCH_CHECK(it != std::end(kGgufArchitectures), file.name(), ": general.architecture ", quote(name),
              " is not supported; supported are \"llama\", \"qwen2\" and \"qwen3\"");
  return *it;
}

/// The parameters of Llama 3's rule that give `factors`, float32 [head_dim / 2]: what llama.cpp divides the frequencies
/// by. A file does not hold them.
json llama3_scaling(const GgufFile& file, const Tensor& factors, double theta, int64_t head_dim) {
  const auto frequencies = [&](const RopeParameters& rope) { return rotary_frequencies(rope, head_dim, 0, 1).inverse; };
  TORCH_CHECK(factors.sizes() == at::IntArrayRef{head_dim / 2}, file.name(), ": rope_freqs.weight is ", factors.sizes(),
              ", expected [", head_dim / 2, "]");
  RopeParameters rope{.type = RopeParameters::Type::kLlama3,
                      .theta = theta,
                      .factor = shortest(factors.max().item<double>()),
                      .low_freq_factor = 1,
                      .high_freq_factor = 4};
  for (int64_t context = 16; context <= kMaxDimension; context *= 2) {
    rope.original_max_position_embeddings = context;
    if (!at::allclose(frequencies({.theta = theta}) / frequencies(rope), factors, 1e-4)) continue;
    return {{"rope_type", "llama3"},
            {"factor", rope.factor},
            {"low_freq_factor", rope.low_freq_factor},
            {"high_freq_factor", rope.high_freq_factor},
            {"original_max_position_embeddings", context}};
  }
  TORCH_CHECK(false, file.name(),
              ": rope_freqs.weight follows another rule than Llama 3's, which is not supported; use the original "
              "checkpoint");
}

json config_of(const GgufFile& file) {
  JsonObject metadata(file.metadata(), file.name());
  const GgufArchitecture& architecture = architecture_of(file);
  const auto key = [&](const char* name) { return fmt::format("{}.{}", architecture.name, name); };
  const auto size = [&](const char* name, int64_t fallback) {
    const int64_t value = metadata.integer(key(name), fallback, fallback < 0 ? 1 : 0, kMaxDimension);
    TORCH_CHECK(value >= 0, file.name(), ": ", key(name), " is missing");
    return value;
  };
  const auto embedding = file.tensors().find("token_embd.weight");
  TORCH_CHECK(embedding != file.tensors().end() && embedding->second.shape.size() == 2, file.name(),
              ": token_embd.weight is missing or no matrix");
  const int64_t hidden = size("embedding_length", -1), heads = size("attention.head_count", -1);
  TORCH_CHECK(heads > 0, file.name(), ": ", key("attention.head_count"), " is 0");
  const int64_t head_dim = size("attention.key_length", hidden / heads);
  TORCH_CHECK(
      size("attention.value_length", head_dim) == head_dim && size("rope.dimension_count", head_dim) == head_dim,
      file.name(),
      ": values of another size than keys, or rotary embeddings of a part of a head, are not "
      "supported");
  TORCH_CHECK(size("expert_count", 0) == 0, file.name(), ": mixtures of experts are not supported");
  const double theta = shortest(metadata.number(key("rope.freq_base"), 10000.0, 1.0, 1e12));
  json config{{"architectures", {architecture.architecture}},
              {"model_type", architecture.model_type},
              {"hidden_act", "silu"},
              {"hidden_size", hidden},
              {"intermediate_size", size("feed_forward_length", -1)},
              {"num_hidden_layers", size("block_count", -1)},
              {"num_attention_heads", heads},
              {"num_key_value_heads", size("attention.head_count_kv", heads)},
              {"head_dim", head_dim},
              {"vocab_size", embedding->second.shape[0]},
              {"max_position_embeddings", size("context_length", 2048)},
              {"rms_norm_eps", shortest(metadata.number(key("attention.layer_norm_rms_epsilon"), 1e-5, 0.0, 1.0))},
              {"rope_theta", theta},
              {"tie_word_embeddings", !file.tensors().contains("output.weight")},
              {"torch_dtype", "float16"}};
  const std::string scaling = metadata.text(key("rope.scaling.type"), "none");
  TORCH_CHECK(scaling == "none" || scaling == "linear", file.name(), ": rope scaling of type \"", scaling,
              "\" is not supported in GGUF files; use the original checkpoint");
  if (scaling == "linear") {
    const double factor = shortest(metadata.number(key("rope.scaling.factor"), 1.0, 1e-6, 1e6));
    config["rope_scaling"] = {{"rope_type", "linear"}, {"factor", factor}};
  }
  if (file.tensors().contains(kRopeFactors)) {
    TORCH_CHECK(scaling == "none", file.name(), ": ", kRopeFactors, " and rope scaling together are not supported");
    TORCH_CHECK(head_dim > 0 && head_dim % 2 == 0, file.name(), ": heads of ", head_dim, " features do not turn");
    config["rope_scaling"] = llama3_scaling(file, gguf_values(file, kRopeFactors), theta, head_dim);
  }
  constexpr std::pair<const char*, const char*> kTokens[] = {
      {"bos", "bos_token_id"}, {"eos", "eos_token_id"}, {"padding", "pad_token_id"}};
  for (const auto& [from, to] : kTokens) {
    const std::string name = fmt::format("tokenizer.ggml.{}_token_id", from);
    if (metadata.contains(name)) config[to] = metadata.integer(name, 0, 0, kMaxDimension);
  }
  return config;
}

/// The order of Hugging Face of what llama.cpp stores with neighbouring features in pairs.
Tensor unpermute_rows(const Tensor& rows, int64_t heads) {
  TORCH_CHECK(rows.size(0) % (2 * heads) == 0, "gguf: ", rows.size(0), " rows of q or k are not pairs of features of ",
              heads, " heads");
  std::vector<int64_t> shape = rows.sizes().vec();
  return rows.reshape({heads, shape[0] / heads / 2, 2, -1}).transpose(1, 2).reshape(shape);
}

/// Collects the tensors of a file under their new names.
class Translation {
 public:
  explicit Translation(std::shared_ptr<const GgufFile> file) : file_(std::move(file)) {
    // Reading a tensor of an unknown type or one that is cut off is an error now and not after an hour.
    for (const auto& [name, entry] : file_->tensors()) {
      try {
        file_->bytes(name, gguf_num_bytes(static_cast<GgufType>(entry.type), entry.shape));
      } catch (const c10::Error& error) {
        TORCH_CHECK(false, file_->name(), ": ", name, ": ", error.what_without_backtrace());
      }
    }
    permuted_ = architecture_of(*file_).permuted;
    config_ = config_of(*file_);
  }

  StoredModel model() {
    add("token_embd.weight", "model.embed_tokens.weight", 0);
    add("output_norm.weight", "model.norm.weight", 0);
    add("output.weight", "lm_head.weight", 0);
    const int64_t blocks = config_["num_hidden_layers"].get<int64_t>();
    TORCH_CHECK(blocks <= static_cast<int64_t>(file_->tensors().size()), file_->name(), ": block_count is ", blocks,
                " but there are ", file_->tensors().size(), " tensors");
    for (int64_t block = 0; block < blocks; ++block) {
      const std::string from = fmt::format("blk.{}.", block), to = fmt::format("model.layers.{}.", block);
      add(from + "attn_norm.weight", to + "input_layernorm.weight", 0);
      add(from + "ffn_norm.weight", to + "post_attention_layernorm.weight", 0);
      add(from + "attn_q_norm.weight", to + "self_attn.q_norm.weight", 0);
      add(from + "attn_k_norm.weight", to + "self_attn.k_norm.weight", 0);
      for (const auto& [name, theirs] : gguf_linear_names()) {
        const char* count = !permuted_                   ? nullptr
                            : name == "self_attn.q_proj" ? "num_attention_heads"
                            : name == "self_attn.k_proj" ? "num_key_value_heads"
                                                         : nullptr;
        const int64_t heads = count == nullptr ? 0 : config_[count].get<int64_t>();
        add_linear(from + theirs, to + name, heads);
        add(from + theirs + ".bias", to + name + ".bias", heads);
      }
    }
    // What nothing above asked for keeps its own name, so that find_unused sees it.
    for (const auto& [name, entry] : file_->tensors()) {
      if (used_.contains(name) || name == kRopeFactors) continue;
      if (!tensors_.contains(name)) add(name, name, 0);
    }
    StoredModel model(
        Checkpoint(file_->name(), config_, std::move(tensors_), file_->num_bytes()), "gguf",
        [this](const std::string& linear) {
          const auto bits = bits_.find(linear);
          if (bits == bits_.end()) return LinearFormat{};
          return LinearFormat{
              .weights = QuantSpec{.num_bits = bits->second, .strategy = Strategy::kGroup, .group_size = kGroup},
              .codes = LinearFormat::Codes::kInt8};
        });
    for (const auto& [name, entry] : file_->tensors()) {
      const auto type = static_cast<GgufType>(entry.type);
      model.bytes_by_type[gguf_type_name(type)] += gguf_num_bytes(type, entry.shape);
    }
    return model;
  }

 private:
  /// @param heads  of rows that llama.cpp permutes, otherwise 0
  void add(const std::string& from, const std::string& to, int64_t heads) {
    const auto it = file_->tensors().find(from);
    if (it == file_->tensors().end()) return;
    const auto& [type, shape, offset] = it->second;
    used_.insert(from);
    tensors_[to] = {{gguf_values_dtype(static_cast<GgufType>(type)), shape}, [from, heads, file = file_] {
                      const Tensor values = gguf_values(*file, from);
                      return heads > 0 ? unpermute_rows(values, heads) : values;
                    }};
  }

  void add_linear(const std::string& from, const std::string& to, int64_t heads) {
    const auto it = file_->tensors().find(from + ".weight");
    if (it == file_->tensors().end()) return;
    const auto type = static_cast<GgufType>(it->second.type);
    if ((type != GgufType::kQ8_0 && type != GgufType::kQ4_0) || it->second.shape.size() != 2) {
      return add(from + ".weight", to + ".weight", heads);
    }
    used_.insert(from + ".weight");
    bits_[to] = type == GgufType::kQ8_0 ? 8 : 4;
    const auto add_part = [&](const char* name, TensorInfo info, decltype(gguf_codes)* decode) {
      Checkpoint::MadeTensor& made = tensors_[to + name];
      made.info = std::move(info);
      made.make = [=, file = file_, stored = from + ".weight", shape = it->second.shape] {
        const Tensor rows = decode(type, file->bytes(stored, gguf_num_bytes(type, shape)), shape);
        return heads > 0 ? unpermute_rows(rows, heads) : rows;
      };
    };
    add_part(".weight", {at::kChar, it->second.shape}, gguf_codes);
    add_part(".weight_scale", {at::kHalf, gguf_scales_shape(it->second.shape)}, gguf_scales);
  }

  std::shared_ptr<const GgufFile> file_;
  bool permuted_ = false;
  json config_;
  Checkpoint::MadeTensors tensors_;
  std::map<std::string, int64_t> bits_;  ///< of linears with codes
  std::set<std::string> used_;           ///< names in the file
};

}  // namespace

const std::map<std::string, std::string>& gguf_linear_names() {
  static const std::map<std::string, std::string> names = {
      {"self_attn.q_proj", "attn_q"},      {"self_attn.k_proj", "attn_k"}, {"self_attn.v_proj", "attn_v"},
      {"self_attn.o_proj", "attn_output"}, {"mlp.gate_proj", "ffn_gate"},  {"mlp.up_proj", "ffn_up"},
      {"mlp.down_proj", "ffn_down"}};
  return names;
}

Tensor gguf_values(const GgufFile& file, const std::string& name) {
  const GgufFile::Entry& entry = file.tensors().at(name);
  const auto type = static_cast<GgufType>(entry.type);
  return gguf_values(type, file.bytes(name, gguf_num_bytes(type, entry.shape)), entry.shape);
}

StoredModel read_gguf(const std::filesystem::path& path) {
  return Translation(std::make_shared<const GgufFile>(path)).model();
}

}  // namespace baseq
