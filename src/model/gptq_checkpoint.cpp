#include "gptq_checkpoint.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "baseq/io/dtype_name.h"
#include "baseq/io/json_object.h"
#include "baseq/quant/pack.h"
#include "compressed_tensors_config.h"

namespace baseq {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr const char* kPacked = ".qweight";

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

struct Layout {
  bool awq = false;
  int64_t num_bits = 4;
  int64_t group_size = 0;   ///< 0: one scale a channel
  int64_t zero_offset = 0;  ///< added to stored zero points
};

std::string lower(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return std::tolower(c); });
  return text;
}

Layout read_layout(const json& value, const std::string& path) {
  JsonObject config(value, path);
  Layout layout;
  layout.awq = config.text("quant_method", "") == "awq";
  layout.num_bits = config.integer(config.contains("w_bit") ? "w_bit" : "bits", 4, 2, 8);
  const int64_t group_size =
      config.integer(config.contains("q_group_size") ? "q_group_size" : "group_size", 128, -1, int64_t{1} << 30);
  TORCH_CHECK(group_size != 0, path, ": group_size is 0, expected -1 or a positive number");
  layout.group_size = std::max<int64_t>(group_size, 0);
  if (layout.awq) {
    const std::string version = lower(config.text("version", "gemm"));
    TORCH_CHECK(version == "gemm", path, ": version \"", version, "\" is not supported; supported is \"gemm\"");
    TORCH_CHECK(layout.num_bits == 4, path, ": AWQ of ", layout.num_bits, " bits is not supported; supported are 4");
    return layout;
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
  // Version 1 stores zero points less one.
  layout.zero_offset = format == "gptq" ? 1 : 0;
  return layout;
}

/// int8 [in_features, out_features] of AWQ's words: nibble i of a word belongs to column order[i] of eight.
Tensor unpack_awq(const Tensor& packed) {
  const Tensor codes = unpack_from_int32(packed, 4, packed.size(1) * 8);
  const Tensor nibble_of = at::tensor({0, 4, 1, 5, 2, 6, 3, 7}, at::kLong);
  return codes.view({codes.size(0), -1, 8}).index_select(2, nibble_of).reshape(codes.sizes());
}

/// The tensors of one linear as GPTQ and AWQ name them.
class PackedLinear {
 public:
  PackedLinear(std::shared_ptr<const Checkpoint> checkpoint, std::string name, const Layout& layout)
      : checkpoint_(std::move(checkpoint)), name_(std::move(name)), layout_(layout) {}

  Tensor codes() const {  ///< int8 [out_features, in_features]
    const Tensor packed = words(kPacked);
    if (layout_.awq) return unpack_awq(packed).t().contiguous();
    const int64_t values = packed.size(0) * 32;
    TORCH_CHECK(values % layout_.num_bits == 0, name_, ".qweight: ", packed.size(0),
                " rows of words hold no whole "
                "number of codes of ",
                layout_.num_bits, " bits");
    return unpack_from_int32(packed.t(), layout_.num_bits, values / layout_.num_bits);
  }
  Tensor scale() const {  ///< [out_features, groups] in the dtype of the file
    const Tensor scales = checkpoint_->tensor(name_ + ".scales");
    TORCH_CHECK(scales.dim() == 2 && scales.is_floating_point(), name_, ".scales: is ",
                dtype_name(scales.scalar_type()), " of size ", scales.sizes(),
                ", expected a floating type and [groups, out_features]");
    return scales.t().contiguous();
  }
  Tensor zero_point() const {  ///< float32 [out_features, groups], 0 in the middle
    const Tensor packed = words(".qzeros");
    const Tensor zeros = layout_.awq
                             ? unpack_awq(packed)
                             : unpack_from_int32(packed, layout_.num_bits, packed.size(1) * 32 / layout_.num_bits);
    return (zeros.t().to(at::kFloat) + layout_.zero_offset).contiguous();
  }
  Tensor group_index() const { return checkpoint_->tensor(name_ + ".g_idx"); }

 private:
  Tensor words(const char* ending) const {
    const Tensor packed = checkpoint_->tensor(name_ + ending);
    TORCH_CHECK(packed.dim() == 2 && packed.scalar_type() == at::kInt, name_, ending, ": is ",
                dtype_name(packed.scalar_type()), " of size ", packed.sizes(), ", expected I32 in two dimensions");
    return packed;
  }
  std::shared_ptr<const Checkpoint> checkpoint_;
  std::string name_;
  Layout layout_;
};

}  // namespace

bool is_gptq_or_awq(const Checkpoint& checkpoint) {
  const json config = find_config(checkpoint);
  if (!config.is_object()) return false;
  const auto method = config.find("quant_method");
  return method != config.end() && (*method == "gptq" || *method == "awq");
}

Checkpoint gptq_checkpoint(std::shared_ptr<const Checkpoint> checkpoint) {
  const json value = find_config(*checkpoint);
  const Layout layout = read_layout(value, (checkpoint->path() / "config.json").string() + ": quantization_config");
  std::map<std::string, Checkpoint::MakeTensor, std::less<>> tensors;
  std::vector<std::string> linears;
  for (const std::string& name : checkpoint->names()) {
    if (name.ends_with(kPacked)) linears.push_back(name.substr(0, name.size() - std::string_view(kPacked).size()));
    tensors[name] = [checkpoint, name] { return checkpoint->tensor(name); };
  }
  bool symmetric = true;
  for (const std::string& name : linears) {
    const PackedLinear linear(checkpoint, name, layout);
    symmetric = symmetric && linear.zero_point().eq(0).all().item<bool>();
  }
  for (const std::string& name : linears) {
    const PackedLinear linear(checkpoint, name, layout);
    for (const char* part : {kPacked, ".qzeros", ".scales", ".g_idx"}) tensors.erase(name + part);
    tensors[name + ".weight"] = [linear] { return linear.codes(); };
    tensors[name + ".weight_scale"] = [linear] { return linear.scale(); };
    if (!symmetric) tensors[name + ".weight_zero_point"] = [linear] { return linear.zero_point(); };
    if (checkpoint->contains(name + ".g_idx")) {
      tensors[name + ".weight_g_idx"] = [linear] { return linear.group_index(); };
    }
  }
  json weights{{"num_bits", layout.num_bits}, {"type", "int"}, {"symmetric", symmetric}};
  weights["strategy"] = layout.group_size > 0 ? "group" : "channel";
  if (layout.group_size > 0) weights["group_size"] = layout.group_size;
  json config = checkpoint->config();
  config["quantization_config"] = {{"quant_method", CompressedTensorsConfig::kMethod},
                                   {"format", "int-quantized"},
                                   {"read_from", value.at("quant_method")},
                                   {"config_groups", {{"group_0", {{"targets", linears}, {"weights", weights}}}}}};
  return Checkpoint(checkpoint->path(), std::move(config), std::move(tensors), checkpoint->num_bytes());
}

}  // namespace baseq
