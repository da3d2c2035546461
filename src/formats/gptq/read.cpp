#include "formats/gptq/read.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <map>

#include "formats/gptq/layout.h"
#include "io/dtype_name.h"
#include "io/json_object.h"

namespace baseq {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

/// Where the configuration is: config.json, or the file that AutoGPTQ wrote beside it.
json find_config(const Checkpoint& checkpoint) {
  const auto it = checkpoint.config().find("quantization_config");
  if (it != checkpoint.config().end() && it->is_object()) return *it;
  const fs::path path = checkpoint.path() / "quantize_config.json";
  std::error_code error;
  if (!fs::exists(path, error)) return nullptr;
  json config = read_json_file(path.string());
  if (config.is_object() && !config.contains("quant_method")) config["quant_method"] = "gptq";
  return config;
}

struct StoredGrid {
  PackedLayout layout;
  int64_t group_size = 0;  ///< 0: one scale per channel
  bool scattered = false;  ///< columns were rounded in another order: each linear says which group a column is in
};

std::string lower(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return std::tolower(c); });
  return text;
}

StoredGrid read_grid(const json& value, const std::string& path) {
  JsonObject config(value, path);
  StoredGrid grid;
  PackedLayout& layout = grid.layout;
  layout.awq = config.text("quant_method", "") == "awq";
  layout.num_bits = config.integer(config.contains("w_bit") ? "w_bit" : "bits", 4, 2, 8);
  const int64_t group_size =
      config.integer(config.contains("q_group_size") ? "q_group_size" : "group_size", 128, -1, int64_t{1} << 30);
  TORCH_CHECK(group_size != 0, path, ": group_size is 0, expected -1 or a positive number");
  grid.group_size = std::max<int64_t>(group_size, 0);
  if (layout.awq) {
    const std::string version = lower(config.text("version", "gemm"));
    TORCH_CHECK(version == "gemm", path, ": version \"", version, "\" is not supported; supported is \"gemm\"");
    TORCH_CHECK(layout.num_bits == 4, path, ": AWQ of ", layout.num_bits, " bits is not supported; supported are 4");
    return grid;
  }
  const bool known = layout.num_bits == 2 || layout.num_bits == 3 || layout.num_bits == 4 || layout.num_bits == 8;
  TORCH_CHECK(known, path, ": ", layout.num_bits, " bits are not supported; supported are 2, 3, 4, 8");
  const std::string format = config.text("checkpoint_format", "gptq");
  TORCH_CHECK((format == "gptq" || format == "gptq_v2") && !config.boolean("is_marlin_format", false), path,
              ": checkpoint_format \"", format, "\" is not supported; supported are \"gptq\" and \"gptq_v2\"");
  const std::string word = config.text("pack_dtype", "int32");
  TORCH_CHECK(word == "int32", path, ": pack_dtype \"", word, "\" is not supported; supported is \"int32\"");
  const auto dynamic = value.find("dynamic");
  TORCH_CHECK(dynamic == value.end() || dynamic->empty(), path,
              ": dynamic: settings of single modules are not "
              "supported");
  layout.version = format == "gptq" ? 1 : 2;
  grid.scattered = grid.group_size > 0 && config.boolean("desc_act", false);
  return grid;
}

/// The tensors of one linear as GPTQ and AWQ name them.
class PackedLinear {
 public:
  PackedLinear(std::shared_ptr<const Checkpoint> checkpoint, std::string name, const PackedLayout& layout)
      : checkpoint_(std::move(checkpoint)), name_(std::move(name)), layout_(layout) {}

  Checkpoint::MadeTensor codes() const {  ///< int8 [out_features, in_features]
    const std::vector<int64_t> packed = packed_shape(kQweight);
    TORCH_CHECK(layout_.awq || packed[0] * 32 % layout_.num_bits == 0, name_, kQweight, ": ", packed[0],
                " rows of words hold no whole number of codes of ", layout_.num_bits, " bits");
    return {{at::kChar, layout_.codes_shape(packed)},
            [linear = *this] { return linear.layout_.unpack_codes(linear.words(kQweight)); }};
  }
  Checkpoint::MadeTensor scale() const {  ///< [out_features, groups] in the dtype of the file
    const std::string name = name_ + kScales;
    const auto [dtype, shape] = checkpoint_->info(name);
    TORCH_CHECK(shape.size() == 2 && at::isFloatingType(dtype), name, ": is ", dtype_name(dtype), " of size ",
                at::IntArrayRef(shape), ", expected a floating type and [groups, out_features]");
    return {{dtype, {shape[1], shape[0]}},
            [checkpoint = checkpoint_, name] { return checkpoint->tensor(name).t().contiguous(); }};
  }
  Checkpoint::MadeTensor zero_point() const {  ///< float32 [out_features, groups], 0 in the middle
    const std::vector<int64_t> packed = packed_shape(kQzeros);
    return {{at::kFloat, {layout_.per_words(packed[1]), packed[0]}},
            [linear = *this] { return linear.layout_.unpack_zero_points(linear.words(kQzeros)); }};
  }

 private:
  std::vector<int64_t> packed_shape(const char* ending) const {
    const auto [dtype, shape] = checkpoint_->info(name_ + ending);
    TORCH_CHECK(shape.size() == 2 && shape[0] > 0 && shape[1] > 0 && dtype == at::kInt, name_, ending, ": is ",
                dtype_name(dtype), " of size ", at::IntArrayRef(shape), ", expected I32 in two dimensions");
    return shape;
  }
  Tensor words(const char* ending) const { return checkpoint_->tensor(name_ + ending); }

  std::shared_ptr<const Checkpoint> checkpoint_;
  std::string name_;
  PackedLayout layout_;
};

}  // namespace

bool is_gptq_or_awq(const Checkpoint& checkpoint) {
  const json config = find_config(checkpoint);
  if (!config.is_object()) return false;
  const auto method = config.find("quant_method");
  return method != config.end() && (*method == "gptq" || *method == "awq");
}

StoredModel read_gptq(const Checkpoint& checkpoint) {
  const auto [layout, group_size, scattered] =
      read_grid(find_config(checkpoint), (checkpoint.path() / "config.json").string() + ": quantization_config");
  Checkpoint::MadeTensors tensors;
  std::map<std::string, PackedLinear> linears;
  const auto stored = std::make_shared<const Checkpoint>(checkpoint);
  const auto as_stored = [&](const std::string& name) -> Checkpoint::MadeTensor {
    return {stored->info(name), [stored, name] { return stored->tensor(name); }};
  };
  for (const std::string& name : checkpoint.names()) {
    tensors[name] = as_stored(name);
    if (!name.ends_with(kQweight)) continue;
    const std::string linear = name.substr(0, name.size() - std::string_view(kQweight).size());
    linears.emplace(linear, PackedLinear(stored, linear, layout));
  }
  bool symmetric = true;
  for (const auto& [name, linear] : linears) {
    const Checkpoint::MadeTensor zero_point = linear.zero_point();
    const std::vector<int64_t> groups = linear.scale().info.shape;
    TORCH_CHECK(zero_point.info.shape == groups, name, kQzeros, ": holds zero points ",
                at::IntArrayRef(zero_point.info.shape), " but ", kScales + 1, " are ", at::IntArrayRef(groups),
                ", both as [out_features, groups]");
    TORCH_CHECK(!scattered || checkpoint.contains(name + kGroupIndex), name, kGroupIndex,
                " is missing, but quantization_config says desc_act: the groups of the columns are not known");
    symmetric = symmetric && zero_point.make().eq(0).all().item<bool>();
  }
  for (const auto& [name, linear] : linears) {
    for (const char* part : {kQweight, kQzeros, kScales, kGroupIndex}) tensors.erase(name + part);
    tensors[name + ".weight"] = linear.codes();
    tensors[name + ".weight_scale"] = linear.scale();
    if (!symmetric) tensors[name + ".weight_zero_point"] = linear.zero_point();
    if (checkpoint.contains(name + kGroupIndex)) tensors[name + ".weight_g_idx"] = as_stored(name + kGroupIndex);
  }
  const QuantSpec spec{.num_bits = layout.num_bits,
                       .symmetric = symmetric,
                       .strategy = group_size > 0 ? Strategy::kGroup : Strategy::kChannel,
                       .group_size = group_size};
  return {Checkpoint(checkpoint.path(), checkpoint.config(), std::move(tensors), checkpoint.num_bytes()),
          layout.awq ? "awq" : "gptq", [&](const std::string& linear) {
            return linears.contains(linear) ? LinearFormat{.weights = spec, .codes = LinearFormat::Codes::kInt8}
                                            : LinearFormat{};
          }};
}

}  // namespace baseq
