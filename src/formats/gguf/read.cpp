#include "formats/gguf/read.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <fstream>

#include "baseq/model/decoder_layer.h"
#include "baseq/model/model.h"
#include "formats/gguf/file.h"
#include "formats/gguf/names.h"
#include "io/json_object.h"
#include "io/strict_json.h"

namespace baseq {
namespace {

using nlohmann::json;

constexpr int64_t kGroup = 32;  // of blocks with codes
constexpr int64_t kMaxSize = int64_t{1} << 30;
constexpr std::string_view kWeight = ".weight";

/// A float32 as a person would have written it: 1e-05 and not 9.99999974737875e-06.
double shortest(double value) { return std::stod(fmt::format("{}", static_cast<float>(value))); }

const GgufArchitecture& architecture_of(const GgufFile& file) {
  const std::string name = JsonObject(file.metadata(), file.name()).text("general.architecture", "");
  const GgufArchitecture* architecture = gguf_architecture_named(name);
  TORCH_CHECK(architecture != nullptr, file.name(), ": general.architecture ", quote(name),
              " is not supported; supported are \"llama\", \"qwen2\" and \"qwen3\"");
  return *architecture;
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
  for (int64_t context = 16; context <= kMaxSize; context *= 2) {
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

/// The sizes under config.json's names.
json sizes_of(const GgufFile& file, const std::string& prefix, JsonObject& metadata) {
  json sizes;
  const auto known = [&](const char* field) { return sizes.at(field).get<int64_t>(); };
  for (const auto& [name, field, member] : kGgufSizes) {
    int64_t fallback = -1;  // the file has to hold it
    if (member == &ModelConfig::max_position_embeddings) fallback = 2048;
    if (member == &ModelConfig::num_key_value_heads) fallback = known("num_attention_heads");
    if (member == &ModelConfig::head_dim) fallback = known("hidden_size") / known("num_attention_heads");
    const int64_t value = metadata.integer(prefix + name, fallback, fallback < 0 ? 1 : 0, kMaxSize);
    TORCH_CHECK(value >= 0, file.name(), ": ", prefix, name, " is missing");
    sizes[field] = value;
  }
  return sizes;
}

/// Rope scaling by the metadata and the factors among the tensors; null: there is none.
json rope_scaling_of(const GgufFile& file, const std::string& prefix, JsonObject& metadata, double theta,
                     int64_t head_dim) {
  const std::string scaling = metadata.text(prefix + "rope.scaling.type", "none");
  TORCH_CHECK(scaling == "none" || scaling == "linear", file.name(), ": rope scaling of type \"", scaling,
              "\" is not supported in GGUF files; use the original checkpoint");
  const bool has_factors = file.tensors().contains(kRopeFactors);
  TORCH_CHECK(!has_factors || scaling == "none", file.name(), ": ", kRopeFactors,
              " and rope scaling together are not supported");
  if (scaling == "linear") {
    return {{"rope_type", "linear"},
            {"factor", shortest(metadata.number(prefix + "rope.scaling.factor", 1.0, 1e-6, 1e6))}};
  }
  if (!has_factors) return nullptr;
  TORCH_CHECK(head_dim > 0 && head_dim % 2 == 0, file.name(), ": heads of ", head_dim, " features do not turn");
  return llama3_scaling(file, gguf_values(file, kRopeFactors), theta, head_dim);
}

json config_of(const GgufFile& file) {
  JsonObject metadata(file.metadata(), file.name());
  const GgufArchitecture& architecture = architecture_of(file);
  const std::string prefix = std::string(architecture.name) + ".";
  const auto embedding = file.tensors().find("token_embd.weight");
  TORCH_CHECK(embedding != file.tensors().end() && embedding->second.shape.size() == 2, file.name(),
              ": token_embd.weight is missing or no matrix");
  json config = sizes_of(file, prefix, metadata);
  const auto head_dim = config["head_dim"].get<int64_t>();
  for (const char* key : {"attention.value_length", "rope.dimension_count"}) {
    TORCH_CHECK(metadata.integer(prefix + key, head_dim, 0, kMaxSize) == head_dim, file.name(),
                ": values of another size than keys, or rotary embeddings of a part of a head, are not supported");
  }
  TORCH_CHECK(metadata.integer(prefix + "expert_count", 0, 0, kMaxSize) == 0, file.name(),
              ": mixtures of experts are not supported");
  const double theta = shortest(metadata.number(prefix + "rope.freq_base", 10000.0, 1.0, 1e12));
  config.update(
      json{{"architectures", {architecture.architecture}},
           {"model_type", architecture.model_type},
           {"hidden_act", "silu"},
           {"vocab_size", embedding->second.shape[0]},
           {"rms_norm_eps", shortest(metadata.number(prefix + "attention.layer_norm_rms_epsilon", 1e-5, 0.0, 1.0))},
           {"rope_theta", theta},
           {"tie_word_embeddings", !file.tensors().contains("output.weight")},
           {"torch_dtype", "float16"}});
  if (json scaling = rope_scaling_of(file, prefix, metadata, theta, head_dim); !scaling.is_null()) {
    config["rope_scaling"] = std::move(scaling);
  }
  for (const auto& [key, field] : kGgufTokenIds) {
    if (metadata.contains(key)) config[field] = metadata.integer(key, 0, 0, kMaxSize);
  }
  return config;
}

/// "model.layers.2.mlp.up_proj.weight" -> "mlp.up_proj"; "" for a tensor of no linear.
std::string linear_of(const std::string& name) {
  for (const SiteInfo& info : sites()) {
    if (!info.is_input() || !name.starts_with("model.layers.")) continue;
    for (const std::string_view reader : info.readers) {
      if (name.find("." + std::string(reader) + ".") != name.npos) return std::string(reader);
    }
  }
  return "";
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
    architecture_ = &architecture_of(*file_);
    config_ = config_of(*file_);
  }

  StoredModel model() {
    const int64_t blocks = config_["num_hidden_layers"].get<int64_t>();
    TORCH_CHECK(blocks <= static_cast<int64_t>(file_->tensors().size()), file_->name(), ": block_count is ", blocks,
                " but there are ", file_->tensors().size(), " tensors");
    for (const auto& [name, entry] : file_->tensors()) {
      if (name == kRopeFactors) continue;
      // A tensor without another name keeps its own, so that find_unused sees it.
      const std::string known = hugging_face_name(name);
      add(name, entry, known.empty() ? name : known);
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
  void add(const std::string& from, const GgufFile::Entry& entry, const std::string& to) {
    TORCH_CHECK(!tensors_.contains(to), file_->name(), ": two tensors stand for ", quote(to), ", one of them is ",
                quote(from));
    const auto type = static_cast<GgufType>(entry.type);
    const std::string linear = linear_of(to);
    const int64_t heads = permuted_heads(*architecture_, linear, config_["num_attention_heads"].get<int64_t>(),
                                         config_["num_key_value_heads"].get<int64_t>());
    const bool has_codes = type == GgufType::kQ8_0 || type == GgufType::kQ4_0;
    if (linear.empty() || !to.ends_with(kWeight) || !has_codes || entry.shape.size() != 2) {
      tensors_[to] = {{gguf_values_dtype(type), entry.shape},
                      [from, heads, file = file_] { return unpermute_rows(gguf_values(*file, from), heads); }};
      return;
    }
    bits_[to.substr(0, to.size() - kWeight.size())] = type == GgufType::kQ8_0 ? 8 : 4;
    const auto add_part = [&](const std::string& name, TensorInfo info, decltype(gguf_codes)* decode) {
      Checkpoint::MadeTensor& made = tensors_[name];
      made.info = std::move(info);
      made.make = [=, file = file_, shape = entry.shape] {
        return unpermute_rows(decode(type, file->bytes(from, gguf_num_bytes(type, shape)), shape), heads);
      };
    };
    add_part(to, {at::kChar, entry.shape}, gguf_codes);
    add_part(to + "_scale", {at::kHalf, gguf_scales_shape(entry.shape)}, gguf_scales);
  }

  std::shared_ptr<const GgufFile> file_;
  const GgufArchitecture* architecture_ = nullptr;
  json config_;
  Checkpoint::MadeTensors tensors_;
  std::map<std::string, int64_t> bits_;  ///< of linears with codes
};

}  // namespace

bool is_gguf(const std::filesystem::path& path) {
  char magic[4] = {};
  std::ifstream(path, std::ios::binary).read(magic, sizeof magic);
  return std::string_view(magic, sizeof magic) == "GGUF";
}

StoredModel read_gguf(const std::filesystem::path& path) {
  return Translation(std::make_shared<const GgufFile>(path)).model();
}

}  // namespace baseq
