#include "gguf_checkpoint.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include "baseq/io/json_object.h"
#include "baseq/quant/gguf_blocks.h"
#include "compressed_tensors_config.h"

namespace baseq {
namespace {

using nlohmann::json;

constexpr int64_t kGroup = 32;  // of blocks with codes
constexpr int64_t kMaxSize = int64_t{1} << 30;

/// A float32 as a person would have written it: 1e-05 and not 9.99999974737875e-06.
double shortest(double value) { return std::stod(fmt::format("{}", static_cast<float>(value))); }

json config_of(const GgufFile& file) {
  JsonObject metadata(file.metadata(), file.name());
  const std::string architecture = metadata.text("general.architecture", "");
  TORCH_CHECK(architecture == "llama", file.name(), ": general.architecture \"", architecture,
              "\" is not supported; supported is \"llama\"");
  const auto size = [&](const char* key, int64_t fallback) {
    const int64_t value = metadata.integer(key, fallback, fallback < 0 ? 1 : 0, kMaxSize);
    TORCH_CHECK(value >= 0, file.name(), ": ", key, " is missing");
    return value;
  };
  const auto embedding = file.tensors().find("token_embd.weight");
  TORCH_CHECK(embedding != file.tensors().end() && embedding->second.shape.size() == 2, file.name(),
              ": token_embd.weight is missing or no matrix");
  const int64_t hidden = size("llama.embedding_length", -1), heads = size("llama.attention.head_count", -1);
  TORCH_CHECK(heads > 0, file.name(), ": llama.attention.head_count is 0");
  const int64_t head_dim = size("llama.attention.key_length", hidden / heads);
  TORCH_CHECK(size("llama.attention.value_length", head_dim) == head_dim &&
                  size("llama.rope.dimension_count", head_dim) == head_dim,
              file.name(),
              ": values of another size than keys, or rotary embeddings of a part of a head, are not "
              "supported");
  const std::string scaling = metadata.text("llama.rope.scaling.type", "none");
  TORCH_CHECK(scaling == "none" && !file.tensors().contains("rope_freqs.weight"), file.name(),
              ": rope scaling is not supported in GGUF files; use the original checkpoint");
  TORCH_CHECK(size("llama.expert_count", 0) == 0, file.name(), ": mixtures of experts are not supported");
  json config{{"architectures", {"LlamaForCausalLM"}},
              {"model_type", "llama"},
              {"hidden_act", "silu"},
              {"hidden_size", hidden},
              {"intermediate_size", size("llama.feed_forward_length", -1)},
              {"num_hidden_layers", size("llama.block_count", -1)},
              {"num_attention_heads", heads},
              {"num_key_value_heads", size("llama.attention.head_count_kv", heads)},
              {"head_dim", head_dim},
              {"vocab_size", embedding->second.shape[0]},
              {"max_position_embeddings", size("llama.context_length", 2048)},
              {"rms_norm_eps", shortest(metadata.number("llama.attention.layer_norm_rms_epsilon", 1e-5, 0.0, 1.0))},
              {"rope_theta", shortest(metadata.number("llama.rope.freq_base", 10000.0, 1.0, 1e12))},
              {"tie_word_embeddings", !file.tensors().contains("output.weight")},
              {"torch_dtype", "float16"}};
  constexpr std::pair<const char*, const char*> kTokens[] = {
      {"bos", "bos_token_id"}, {"eos", "eos_token_id"}, {"padding", "pad_token_id"}};
  for (const auto& [from, to] : kTokens) {
    const std::string key = fmt::format("tokenizer.ggml.{}_token_id", from);
    if (metadata.contains(key)) config[to] = metadata.integer(key, 0, 0, kMaxSize);
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
  explicit Translation(std::shared_ptr<const GgufFile> file) : file_(std::move(file)), config_(config_of(*file_)) {
    // Reading a tensor of an unknown type or one that is cut off is an error now and not after an hour.
    for (const auto& [name, entry] : file_->tensors()) {
      try {
        file_->bytes(name, gguf_num_bytes(static_cast<GgufType>(entry.type), entry.shape));
      } catch (const c10::Error& error) {
        TORCH_CHECK(false, file_->name(), ": ", name, ": ", error.what_without_backtrace());
      }
    }
  }

  Checkpoint checkpoint() {
    add("token_embd.weight", "model.embed_tokens.weight", 0);
    add("output_norm.weight", "model.norm.weight", 0);
    add("output.weight", "lm_head.weight", 0);
    const int64_t blocks = config_["num_hidden_layers"].get<int64_t>();
    TORCH_CHECK(blocks <= static_cast<int64_t>(file_->tensors().size()), file_->name(), ": llama.block_count is ",
                blocks, " but there are ", file_->tensors().size(), " tensors");
    for (int64_t block = 0; block < blocks; ++block) {
      const std::string from = fmt::format("blk.{}.", block), to = fmt::format("model.layers.{}.", block);
      add(from + "attn_norm.weight", to + "input_layernorm.weight", 0);
      add(from + "ffn_norm.weight", to + "post_attention_layernorm.weight", 0);
      for (const auto& [name, theirs] : gguf_linear_names()) {
        const char* count = name == "self_attn.q_proj"   ? "num_attention_heads"
                            : name == "self_attn.k_proj" ? "num_key_value_heads"
                                                         : nullptr;
        const int64_t heads = count == nullptr ? 0 : config_[count].get<int64_t>();
        add_linear(from + theirs, to + name, heads);
        add(from + theirs + ".bias", to + name + ".bias", heads);
      }
    }
    json groups = json::object();
    for (const auto& [bits, targets] : targets_) {
      groups[fmt::format("q{}_0", bits)] = {
          {"targets", targets},
          {"weights",
           {{"num_bits", bits}, {"type", "int"}, {"symmetric", true}, {"strategy", "group"}, {"group_size", kGroup}}}};
    }
    // Also without groups: a quantized checkpoint may have biases that config.json does not promise.
    config_["quantization_config"] = {{"quant_method", CompressedTensorsConfig::kMethod},
                                      {"format", "int-quantized"},
                                      {"read_from", "gguf"},
                                      {"config_groups", groups}};
    return Checkpoint(file_->name(), config_, std::move(tensors_), file_->num_bytes());
  }

 private:
  /// @param heads  of rows that llama.cpp permutes, otherwise 0
  void add(const std::string& from, const std::string& to, int64_t heads) {
    const auto it = file_->tensors().find(from);
    if (it == file_->tensors().end()) return;
    tensors_[to] = [from, heads, entry = it->second, file = file_] {
      const auto type = static_cast<GgufType>(entry.type);
      const Tensor values = gguf_values(type, file->bytes(from, gguf_num_bytes(type, entry.shape)), entry.shape);
      return heads > 0 ? unpermute_rows(values, heads) : values;
    };
  }

  void add_linear(const std::string& from, const std::string& to, int64_t heads) {
    const auto it = file_->tensors().find(from + ".weight");
    if (it == file_->tensors().end()) return;
    const auto type = static_cast<GgufType>(it->second.type);
    if ((type != GgufType::kQ8_0 && type != GgufType::kQ4_0) || it->second.shape.size() != 2) {
      return add(from + ".weight", to + ".weight", heads);
    }
    targets_[type == GgufType::kQ8_0 ? 8 : 4].push_back(to);
    const auto part = [=, file = file_, name = from + ".weight", shape = it->second.shape](Tensor GgufCodes::*of) {
      return [=] {
        const Tensor rows = gguf_codes(type, file->bytes(name, gguf_num_bytes(type, shape)), shape).*of;
        return heads > 0 ? unpermute_rows(rows, heads) : rows;
      };
    };
    tensors_[to + ".weight"] = part(&GgufCodes::codes);
    tensors_[to + ".weight_scale"] = part(&GgufCodes::scale);
  }

  std::shared_ptr<const GgufFile> file_;
  json config_;
  std::map<std::string, Checkpoint::MakeTensor, std::less<>> tensors_;
  std::map<int, std::vector<std::string>> targets_;  ///< by bits
};

}  // namespace

const std::map<std::string, std::string>& gguf_linear_names() {
  static const std::map<std::string, std::string> names = {
      {"self_attn.q_proj", "attn_q"},      {"self_attn.k_proj", "attn_k"}, {"self_attn.v_proj", "attn_v"},
      {"self_attn.o_proj", "attn_output"}, {"mlp.gate_proj", "ffn_gate"},  {"mlp.up_proj", "ffn_up"},
      {"mlp.down_proj", "ffn_down"}};
  return names;
}

Checkpoint gguf_checkpoint(std::shared_ptr<const GgufFile> file) { return Translation(std::move(file)).checkpoint(); }

Checkpoint gguf_checkpoint(const std::filesystem::path& path) {
  return gguf_checkpoint(std::make_shared<const GgufFile>(path));
}

}  // namespace baseq
