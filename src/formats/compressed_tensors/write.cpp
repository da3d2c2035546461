#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <set>

#include "baseq/quant/quantize.h"
#include "formats/compressed_tensors/online_transforms.h"
#include "formats/export_source.h"
#include "model/quantized_linear.h"

namespace baseq {
namespace {

using nlohmann::json;

/// The first version whose packing is a dense stream of bits for every number of bits.
constexpr const char* kVersion = "0.18.0";

/// Activations and weights of 8 bits and one scale a channel: what int8 kernels run.
bool is_int_quantized(const LinearFormat& format) {
  const QuantSpec& weights = *format.weights;
  return format.input_activations && format.input_activations->num_bits == 8 && weights.num_bits == 8 &&
         weights.symmetric && weights.strategy != Strategy::kGroup;
}

const char* format_name(const LinearFormat& format) {
  return is_int_quantized(format) ? "int-quantized" : "pack-quantized";
}

/// A recipe that fits, for the user to quantize with again.
std::string advice(const QuantizationConfig& quantization) {
  if (!quantization.weights) return "format hf carries it, or quantize it with the recipe w4a16-vllm";
  const auto& activations = quantization.input_activations;
  const char* recipe = !activations ? "w4a16-vllm" : activations->num_bits == 8 ? "w8a8-vllm" : "w4a4-vllm";
  const bool scales = quantization.weights->scale_dtype != at::kBFloat16;
  return fmt::format("quantize again with the recipe {}, or change the keys named{}", recipe,
                     scales ? " (grids.weights.scale_dtype to bfloat16, or export with `dtype` float32)" : "");
}

void preflight(const ExportSource& source, at::ScalarType dtype) {
  const QuantizationConfig& quantization = source.quantization();
  const auto& weights = quantization.weights;
  const auto any_input = [&](auto&& is_so) {
    return std::ranges::any_of(source.linears(), [&](const SourceLinear& linear) {
      return linear.format.input_activations && is_so(linear, *linear.format.input_activations);
    });
  };
  using Linear = SourceLinear;
  Obstacles obstacles(source, "compressed-tensors");
  obstacles.add_if(!weights, "weights in full precision");
  obstacles.add_if(quantization.kv_cache.has_value(), "a quantized cache (kv_cache)");
  obstacles.add_if(any_input([](const Linear&, const QuantSpec& input) { return !input.symmetric; }),
                   "asymmetric activations, whose grid here has a real-valued zero point");
  obstacles.add_if(any_input([](const Linear&, const QuantSpec& input) { return input.strategy != Strategy::kToken; }),
                   "activations with another scale than one a token");
  obstacles.add_if(weights && any_input([](const Linear& linear, const QuantSpec&) { return !linear.format.weights; }),
                   "quantized inputs of linears in full precision");
  obstacles.add_if(quantization.input_activations && !source.clips_are_one(),
                   "clip ratios of activations other than 1");
  obstacles.add_if(source.has_quant_tensor(".gain"), "gains of activations");
  obstacles.add_if(source.has_quant_tensor(".shift"), "shifts of activations");
  obstacles.add_if(!quantization.runtime.empty(), "activations that are smoothed at run time (runtime_smooth)");
  for (const QuantSpec& grid : source.grids()) {
    obstacles.add_if(!grid.symmetric && grid.num_bits != 4 && grid.num_bits != 8,
                     fmt::format("asymmetric weights of {} bits (4 and 8 can be)", grid.num_bits));
  }
  obstacles.add_if(quantization.lora_rank > 0, "corrections of low rank (low_rank)");
  add_transform_obstacles(obstacles, source);
  obstacles.add_scale_dtype(dtype);
  obstacles.refuse(advice(quantization));
}

json weight_args(const QuantSpec& spec) {
  const bool group = spec.strategy == Strategy::kGroup;
  return {{"num_bits", spec.num_bits},
          {"type", "int"},
          {"symmetric", spec.symmetric},
          {"strategy", group ? "group" : "channel"},
          {"group_size", group ? json(spec.group_size) : json(nullptr)},
          {"dynamic", false}};
}

json activation_args(const QuantSpec& spec) {
  return {{"num_bits", spec.num_bits},
          {"type", "int"},
          {"symmetric", spec.symmetric},
          {"strategy", "token"},
          {"dynamic", true}};
}

/// The linears of one format.
struct ConfigGroup {
  LinearFormat format;  ///< of the first of them
  std::vector<std::string> targets;
};

bool same_group(const LinearFormat& a, const LinearFormat& b) {
  return a.weights == b.weights && a.input_activations == b.input_activations;
}

json quantization_config(const ExportSource& source) {
  std::vector<ConfigGroup> groups;
  json ignore = json::array({"lm_head"});
  for (const SourceLinear& linear : source.linears()) {
    if (!linear.format.weights) {
      ignore.push_back(linear.full_name);
      continue;
    }
    const auto known =
        std::ranges::find_if(groups, [&](const ConfigGroup& group) { return same_group(group.format, linear.format); });
    ConfigGroup& group = known == groups.end() ? groups.emplace_back(linear.format) : *known;
    group.targets.push_back(linear.full_name);
  }
  if (groups.size() == 1) groups[0].targets = {"Linear"};
  json config_groups = json::object();
  std::set<std::string> formats;
  for (size_t i = 0; i < groups.size(); ++i) {
    const auto& activations = groups[i].format.input_activations;
    const char* format = format_name(groups[i].format);
    formats.insert(format);
    config_groups[fmt::format("group_{}", i)] = {
        {"targets", groups[i].targets},
        {"format", format},
        {"weights", weight_args(*groups[i].format.weights)},
        {"input_activations", activations ? activation_args(*activations) : json(nullptr)},
        {"output_activations", nullptr}};
  }
  return {{"quant_method", "compressed-tensors"},
          {"version", kVersion},
          {"format", formats.size() == 1 ? *formats.begin() : "mixed-precision"},
          {"quantization_status", "compressed"},
          {"ignore", std::move(ignore)},
          {"kv_cache_scheme", nullptr},
          {"config_groups", std::move(config_groups)}};
}

/// The tensors of a linear with codes.
void plan_codes(ExportPlan& plan, const std::shared_ptr<const ExportSource>& source, const SourceLinear& linear,
                at::ScalarType dtype) {
  const QuantSpec spec = *linear.format.weights;
  const int64_t rows = linear.out_features, columns = linear.in_features;
  const int64_t groups = spec.strategy == Strategy::kGroup ? columns / spec.group_size : 1;
  const std::string name = linear.full_name + ".weight";
  const auto quantized = [=]() -> const QuantizedWeight& { return *source->linear(linear).quantized; };
  const auto words = [&](int64_t codes) { return (codes * spec.num_bits + 31) / 32; };
  if (is_int_quantized(linear.format)) {
    plan.tensors.push_back({name, at::kChar, {rows, columns}, [=] { return quantized().codes; }});
  } else {
    plan.tensors.push_back({name + "_packed", at::kInt, {rows, words(columns)}, [=] {
                              return pack_to_int32(quantized().codes, spec.num_bits);
                            }});
    plan.tensors.push_back({name + "_shape", at::kLong, {2}, [=] { return at::tensor({rows, columns}, at::kLong); }});
  }
  plan.tensors.push_back({name + "_scale", dtype, {rows, groups}, [=] { return quantized().qparams.scale.to(dtype); }});
  if (!spec.symmetric) {
    plan.tensors.push_back({name + "_zero_point", at::kInt, {words(rows), groups}, [=] {
                              return pack_zero_points(quantized().qparams.zero_point, spec.num_bits);
                            }});
  }
}

/// A linear with codes as it is written.
Tensor read_written(const Checkpoint& written, const SourceLinear& linear) {
  LinearFormat format{.weights = linear.format.weights};
  if (is_int_quantized(linear.format)) format.codes = LinearFormat::Codes::kInt8;
  if (format.weights->strategy == Strategy::kTensor) format.weights->strategy = Strategy::kChannel;
  return read_quantized_weight(written, linear.full_name, format).weight;
}

void note_dense_codes(ExportPlan& plan, const ExportSource& source) {
  for (const QuantSpec& grid : source.grids()) {
    if (32 % grid.num_bits == 0) continue;
    plan.notes.push_back(fmt::format(
        "Codes of {} bits are packed densely: compressed-tensors 0.18 or newer reads them.", grid.num_bits));
  }
}

void note_tensor_parallelism(ExportPlan& plan, const ExportSource& source) {
  int64_t outputs = 1, inputs = 1;  // of which a device's share is a multiple
  for (const SourceLinear& linear : source.linears()) {
    if (!linear.format.weights) continue;
    const QuantSpec& spec = *linear.format.weights;
    const int64_t a_word = is_int_quantized(linear.format) ? 1 : 32 / std::gcd(int64_t{32}, spec.num_bits);
    if (!spec.symmetric) outputs = std::lcm(outputs, a_word);
    inputs = std::lcm(std::lcm(inputs, a_word), spec.strategy == Strategy::kGroup ? spec.group_size : 1);
  }
  plan.notes.push_back(tensor_parallel_note(source, outputs, inputs));
}

}  // namespace

ExportPlan plan_compressed_tensors(std::shared_ptr<const ExportSource> source, at::ScalarType dtype) {
  preflight(*source, dtype);
  const auto plan_linear = [=](ExportPlan& plan, const SourceLinear& linear) {
    if (linear.format.weights) return plan_codes(plan, source, linear, dtype);
    plan.tensors.push_back({linear.full_name + ".weight", dtype, {linear.out_features, linear.in_features}, [=] {
                              return source->linear(linear).weight.to(dtype);
                            }});
  };
  const auto check_linear = [=](const Checkpoint& written, const SourceLinear& linear) {
    const std::string name = linear.full_name + ".weight";
    const Tensor& weight = source->linear(linear).weight;
    if (linear.format.weights) return expect_written(read_written(written, linear), weight, name);
    expect_written(written.tensor(name), weight.to(dtype), name);
  };
  ExportPlan plan = plan_dense_parts(source, dtype, plan_linear, check_linear);
  plan.config["quantization_config"] = quantization_config(*source);
  note_dense_codes(plan, *source);
  add_transforms(plan, source, dtype);
  if (plan.readme.empty()) note_tensor_parallelism(plan, *source);
  return plan;
}

}  // namespace baseq
