#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "formats/export_source.h"

namespace baseq {

const char* torch_dtype_name(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? "bfloat16" : dtype == at::kHalf ? "float16" : "float32";
}

Obstacles::Obstacles(const ExportSource& source, std::string format) : source_(source), format_(std::move(format)) {
  const ModelConfig& config = source.config();
  for (const SourceLinear& linear : source.linears()) {
    const bool original = linear_shape(config, linear.parts[0]).bias;
    if (!linear.bias || original || source.has_bias_flag(linear)) continue;
    found_.push_back(fmt::format("the bias of {}, for which {} has no place", linear.full_name, config.architecture));
    return;
  }
}

void Obstacles::add_activations() {
  const QuantizationConfig& quantization = source_.quantization();
  const bool inputs = std::ranges::any_of(
      source_.linears(), [](const SourceLinear& linear) { return linear.format.input_activations.has_value(); });
  add_if(inputs, "quantized activations (input_activations)");
  add_if(quantization.kv_cache.has_value(), "a quantized cache (kv_cache)");
  add_if(source_.has_quant_tensor(".gain"), "gains of activations");
  add_if(source_.has_quant_tensor(".shift"), "shifts of activations");
}

void Obstacles::add_online_transforms() {
  for (const SiteInfo& info : sites()) {
    add_if(info.is_input() && source_.has_online_transform(info.site),
           fmt::format("an online transform of the {} (site {})", info.label, info.name));
  }
}

void Obstacles::add_scale_dtype(at::ScalarType dtype) {
  for (const QuantSpec& grid : source_.grids()) {
    if (grid.scale_dtype == dtype || dtype == at::kFloat) continue;
    found_.push_back(fmt::format("{} scales, which {} would round (grids.weights.scale_dtype)",
                                 torch_dtype_name(grid.scale_dtype), torch_dtype_name(dtype)));
    return;
  }
}

void Obstacles::refuse(const std::string& advice) const {
  TORCH_CHECK(found_.empty(), source_.path(), ": format ", format_, " cannot carry ",
              fmt::format("{}", fmt::join(found_, ", ")), "; ", advice);
}

std::string tensor_parallel_note(const ExportSource& source, int64_t output_multiple, int64_t input_multiple) {
  const ModelConfig& config = source.config();
  std::vector<int64_t> possible;
  std::string reason;
  for (const int64_t devices : {2, 4, 8}) {
    std::string found;
    if (config.num_attention_heads % devices != 0) found = fmt::format("{} heads", config.num_attention_heads);
    for (const SourceLinear& linear : source.linears()) {
      if (linear.block > 0 || !found.empty()) break;  // all blocks have the same shapes
      const bool inputs = splits_inputs(linear);
      // Fewer key and value heads than devices are repeated, not split.
      const bool repeated = config.num_key_value_heads < devices && std::ranges::any_of(linear.parts, writes_cache);
      const int64_t size = inputs ? linear.in_features : linear.out_features;
      const int64_t multiple = inputs ? input_multiple : output_multiple;
      if (repeated || size % (devices * multiple) == 0) continue;
      found = fmt::format("{}'s {} {}, split by {}, give no multiple of {}", linear.name, size,
                          inputs ? "inputs" : "outputs", devices, multiple);
    }
    if (found.empty()) possible.push_back(devices);
    if (!found.empty() && reason.empty()) reason = found;
  }
  if (reason.empty()) return "Tensor parallelism over 2, 4 and 8 devices divides every weight at whole groups.";
  return possible.empty()
             ? fmt::format("Tensor parallelism does not divide the weights at whole groups: {}.", reason)
             : fmt::format(
                   "Tensor parallelism divides every weight at whole groups over {} devices, not over more: {}.",
                   fmt::join(possible, " or "), reason);
}

}  // namespace baseq
