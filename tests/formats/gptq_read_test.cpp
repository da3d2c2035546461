#include <gtest/gtest.h>

#include "../tiny_model.h"
#include "formats/gptq/read.h"
#include "model/quantized_linear.h"

namespace baseq {
namespace {

using nlohmann::json;
using test::expect_error;
using Tensors = std::map<std::string, Tensor>;

const std::string kLinear = "model.layers.0.mlp.up_proj";
constexpr int64_t kRows = 16, kColumns = 32, kGroup = 8;

Checkpoint checkpoint_of(const Tensors& tensors, const json& quantization) {
  json config = test::tiny_config({.hidden_size = kColumns, .intermediate_size = kRows});
  config["quantization_config"] = quantization;
  Checkpoint::MadeTensors made;
  for (const auto& [name, tensor] : tensors) {
    made[name] = {{tensor.scalar_type(), tensor.sizes().vec()}, [tensor = tensor] { return tensor; }};
  }
  return Checkpoint("x", config, std::move(made), 0);
}

/// Numbers of 4 bits, eight a word, as the published layouts say: number i of a word is values[order[i]].
Tensor words(const Tensor& values, at::IntArrayRef order) {
  Tensor packed = at::zeros({values.size(0), values.size(1) / 8}, at::kInt);
  for (int64_t row = 0; row < packed.size(0); ++row) {
    for (int64_t word = 0; word < packed.size(1); ++word) {
      uint32_t bits = 0;
      for (int64_t i = 0; i < 8; ++i) {
        bits |= static_cast<uint32_t>(values[row][word * 8 + order[static_cast<size_t>(i)]].item<int64_t>()) << (4 * i);
      }
      packed[row][word] = static_cast<int32_t>(bits);
    }
  }
  return packed;
}

struct Written {
  Tensors tensors;
  Tensor weight;  ///< that they stand for
};

Written write(const std::string& method, int64_t less, bool scattered) {
  const Tensor codes = at::randint(16, {kColumns, kRows}, at::kLong), zeros = at::randint(1, 16, {4, kRows}, at::kLong);
  const Tensor scales = (at::rand({4, kRows}) * 0.1 + 0.01).to(at::kHalf);
  Tensor group = at::arange(kColumns, at::kLong).floor_divide(kGroup);
  if (scattered) group = group.view({4, kGroup}).t().reshape({-1});
  const std::vector<int64_t> plain = {0, 1, 2, 3, 4, 5, 6, 7}, awq = {0, 2, 4, 6, 1, 3, 5, 7};
  Written written;
  written.weight =
      ((codes - zeros.index_select(0, group)).to(at::kFloat) * scales.to(at::kFloat).index_select(0, group))
          .t()
          .contiguous();
  const bool is_awq = method == "awq";
  written.tensors = {{kLinear + ".qweight", is_awq ? words(codes, awq) : words(codes.t(), plain).t().contiguous()},
                     {kLinear + ".qzeros", words(zeros - less, is_awq ? awq : plain)},
                     {kLinear + ".scales", scales}};
  if (!is_awq) written.tensors[kLinear + ".g_idx"] = group.to(at::kInt);
  return written;
}

TEST(GptqRead, WordsStandForTheWeightsOfThePublishedLayouts) {
  at::manual_seed(1);
  const json v1{{"quant_method", "gptq"}, {"bits", 4}, {"group_size", kGroup}};
  json v2 = v1, awq = v1;
  v2["checkpoint_format"] = "gptq_v2";
  awq["quant_method"] = "awq";
  const std::vector<std::tuple<json, int64_t, bool>> cases = {
      {v1, 1, false}, {v1, 1, true}, {v2, 0, false}, {v2, 0, true}, {awq, 0, false}};
  for (const auto& [config, less, scattered] : cases) {
    const auto method = config.at("quant_method").get<std::string>();
    SCOPED_TRACE(config.dump());
    const Written written = write(method, less, scattered);
    const StoredModel model = read_gptq(checkpoint_of(written.tensors, config));
    EXPECT_EQ(model.format, method);
    const LinearFormat& format = model.linears.at(kLinear);
    EXPECT_EQ(format.group_index, scattered);
    EXPECT_EQ(*format.weights, (QuantSpec{.num_bits = 4,
                                          .symmetric = false,
                                          .strategy = Strategy::kGroup,
                                          .group_size = kGroup,
                                          .scale_dtype = at::kHalf}));
    EXPECT_FALSE(model.quantization->uniform);  // no other linear has codes
    EXPECT_TRUE(at::equal(read_quantized_weight(model.tensors, kLinear, format).weight, written.weight));
  }
}

TEST(GptqRead, TensorsThatDoNotFitAreRefusedByName) {
  const json config{{"quant_method", "gptq"}, {"bits", 4}, {"group_size", kGroup}};
  const auto refuses = [&](const std::string& part, const Tensor& tensor, const std::vector<std::string>& message) {
    Tensors tensors = write("gptq", 1, false).tensors;
    tensors[kLinear + part] = tensor;
    expect_error(
        [&] {
          const StoredModel model = read_gptq(checkpoint_of(tensors, config));
          read_quantized_weight(model.tensors, kLinear, model.linears.at(kLinear));
        },
        message);
  };
  refuses(".qweight", at::zeros({4, 16}), {kLinear + ".qweight", "F32", "expected I32"});
  refuses(".qweight", at::zeros({4}, at::kInt), {kLinear + ".qweight", "expected I32 in two dimensions"});
  refuses(".qzeros", at::zeros({3, 2}, at::kInt), {kLinear, "[16, 3]", "[16, 4]"});
  refuses(".scales", at::ones({5, 16}), {kLinear, "[16, 5]", "[16, 4]"});
  refuses(".g_idx", at::full({32}, 9, at::kInt), {kLinear + ".weight_g_idx", "groups from 0 to 3"});
  json strange = config;
  for (const auto& [key, value] : std::map<std::string, json>{
           {"bits", 5}, {"group_size", 0}, {"checkpoint_format", "marlin"}, {"pack_dtype", "int8"}}) {
    strange = config;
    strange[key] = value;
    expect_error([&] { read_gptq(checkpoint_of({}, strange)); }, {"config.json", "quantization_config"});
  }
}

}  // namespace
}  // namespace baseq
