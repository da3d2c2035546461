#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "../io/temp_directory.h"
#include "baseq/io/checkpoint.h"
#include "formats/compressed_tensors/config.h"
#include "model/quantized_linear.h"

namespace baseq {
namespace {

using nlohmann::json;
using test::expect_error;

json group(const std::vector<std::string>& targets, int bits) {
  return {{"targets", targets}, {"weights", {{"num_bits", bits}, {"strategy", "channel"}}}};
}

CompressedTensorsConfig config_of(const json& groups, const std::vector<std::string>& ignored = {},
                                  size_t modules = 8) {
  return {{{"quant_method", "compressed-tensors"},
           {"format", "pack-quantized"},
           {"config_groups", groups},
           {"ignore", ignored}},
          "x/config.json",
          modules};
}

int64_t bits_of(const CompressedTensorsConfig& config, const std::string& module) {
  const LinearFormat format = config.format_of(module);
  return format.weights ? format.weights->num_bits : 0;
}

TEST(CompressedTensorsConfig, TheMostExactTargetDecidesAndTheFirstOfEqualOnes) {
  const CompressedTensorsConfig config = config_of(
      {{"a", group({"Linear", "re:.*down", "m.q"}, 2)}, {"b", group({"Linear", "re:m.*", "m.down", "m.q"}, 3)}},
      {"m.ignored", "re:.*norm$"});
  EXPECT_EQ(bits_of(config, "x.q"), 2);
  EXPECT_EQ(bits_of(config, "m.k"), 3);
  EXPECT_EQ(bits_of(config, "m.l.down"), 2);  // both expressions match
  EXPECT_EQ(bits_of(config, "x.m"), 2);       // from the start of the name
  EXPECT_EQ(bits_of(config, "m.down"), 3);
  EXPECT_EQ(bits_of(config, "m.q"), 2);
  EXPECT_EQ(bits_of(config, "m.ignored"), 0);
  EXPECT_EQ(bits_of(config, "m.norm"), 0);
  EXPECT_EQ(bits_of(config, "m.norm2"), 3);
  EXPECT_EQ(bits_of(config_of({{"a", group({"m.q"}, 2)}}), "m.k"), 0);
  EXPECT_EQ(bits_of(config_of({{"a", group({"Linear"}, 2)}}, {"Linear"}), "m.k"), 0);
}

TEST(CompressedTensorsConfig, ExpressionsThatWouldTakeHoursAreRefused) {
  const std::string name = "model.layers.0.self_attn.q_proj";
  for (const char* hostile : {"re:(.*)*(.*)*(.*)*(.*)*[!?]", "re:(?:[a-z._0-9]|[a-z._0-9]{2})+[!?]",
                              "re:((((.+)+)+)+)+[!?]", "re:(?R)?(.+)+[!?]"}) {
    const CompressedTensorsConfig config = config_of({{"a", group({hostile}, 4)}}, {}, 1000);
    expect_error([&] { config.format_of(name); }, {"takes too long to match", name});
  }
  expect_error(
      [&] {
        config_of({{"a", group({"re:a", "re:b"}, 4)}}, {}, 100'000);
      },
      {"x/config.json", "2 regular expressions for 100000 modules", "at most 1"});
  expect_error(
      [&] {
        config_of({{"a", group(std::vector<std::string>(257, "re:a"), 4)}});
      },
      {"regular expression 257 of the file", "at most 256"});
  expect_error(
      [&] {
        config_of({{"a", group({"re:" + std::string(2000, 'a')}, 4)}});
      },
      {"has 2003 bytes", "at most 1024"});
  expect_error([&] { config_of({{"a", group({"re:("}, 4)}}); }, {"\"re:(\" is not a regular expression"});
}

TEST(CompressedTensorsConfig, ManyNamesAreNoQuadraticWork) {
  std::vector<std::string> names;
  for (int i = 0; i < 100'000; ++i) names.push_back("model.layers." + std::to_string(i));
  const CompressedTensorsConfig config = config_of({{"a", group(names, 4)}}, {}, names.size());
  for (const std::string& name : names) ASSERT_EQ(bits_of(config, name), 4);
}

Checkpoint checkpoint_of(const std::map<std::string, Tensor>& tensors) {
  Checkpoint::MadeTensors made;
  for (const auto& [name, tensor] : tensors) {
    made[name] = {{tensor.scalar_type(), tensor.sizes().vec()}, [tensor = tensor] { return tensor; }};
  }
  return Checkpoint("x", json::object(), std::move(made), 0);
}

TEST(QuantizedLinear, PackedShapesThatDoNotFitAreRefused) {
  using Codes = LinearFormat::Codes;
  for (const int64_t bits : {3, 4, 8}) {
    for (const Codes codes : {Codes::kPacked, Codes::kPadded}) {
      const LinearFormat format{.weights = QuantSpec{.num_bits = bits, .strategy = Strategy::kChannel}, .codes = codes};
      for (const int64_t columns :
           {(int64_t{1} << 62) + 8, (int64_t{1} << 61) + 4, INT64_MAX, INT64_MIN, int64_t{-8}, int64_t{0}}) {
        SCOPED_TRACE(testing::Message() << bits << " bits, " << columns << " columns");
        const Checkpoint checkpoint = checkpoint_of({{"m.weight_packed", at::zeros({1, 1}, at::kInt)},
                                                     {"m.weight_shape", at::tensor({int64_t{1}, columns}, at::kLong)},
                                                     {"m.weight_scale", at::ones({1, 1})}});
        expect_error([&] { read_quantized_weight(checkpoint, "m", format); }, {std::to_string(columns), "columns"});
      }
      for (const Tensor& packed : {at::zeros({0, 5}, at::kInt), at::zeros({5, 0}, at::kInt), at::zeros({4}, at::kInt),
                                   at::zeros({1, 1}, at::kFloat)}) {
        const Checkpoint checkpoint = checkpoint_of({{"m.weight_packed", packed},
                                                     {"m.weight_shape", at::tensor({1, 8}, at::kLong)},
                                                     {"m.weight_scale", at::ones({1, 1})}});
        expect_error([&] { read_quantized_weight(checkpoint, "m", format); },
                     {"m.weight_packed: is ", packed.is_floating_point() ? "F32" : "I32", "expected I32"});
      }
    }
  }
}

}  // namespace
}  // namespace baseq
