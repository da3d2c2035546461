#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "../tiny_model.h"
#include "baseq/quant/gptq.h"
#include "formats/gguf/blocks.h"

namespace baseq {
namespace {

TEST(GgufBlocks, SymmetricBlocksComeBackAsCodes) {
  for (const auto& [type, bits] : {std::pair{GgufType::kQ8_0, 8}, std::pair{GgufType::kQ4_0, 4}}) {
    const QuantSpec spec{.num_bits = bits, .strategy = Strategy::kGroup, .group_size = 32, .scale_dtype = at::kHalf};
    const QuantizedWeight weight = round_to_nearest(test::random_normal({5, 96}, 1, at::kFloat), spec);
    const Tensor bytes = gguf_blocks(type, weight.codes, weight.qparams.scale, {});
    ASSERT_EQ(bytes.numel(), gguf_num_bytes(type, {5, 96}));
    const Tensor codes = gguf_codes(type, bytes, {5, 96}), scale = gguf_scales(type, bytes, {5, 96});
    EXPECT_TRUE(at::equal(codes, weight.codes));
    EXPECT_TRUE(at::equal(scale.to(at::kFloat), weight.qparams.scale));
    EXPECT_TRUE(at::equal(gguf_values(type, bytes, {5, 96}), weight.dequantized()));
  }
}

TEST(GgufBlocks, BlocksWithAMinimumComeBackAsValues) {
  const QuantSpec spec{
      .num_bits = 4, .symmetric = false, .strategy = Strategy::kGroup, .group_size = 32, .scale_dtype = at::kHalf};
  const QuantizedWeight weight = round_to_nearest(test::random_normal({3, 64}, 2, at::kFloat), spec);
  const Tensor bytes = gguf_blocks(GgufType::kQ4_1, weight.codes, weight.qparams.scale, weight.qparams.zero_point);
  EXPECT_LT(test::relative_error(gguf_values(GgufType::kQ4_1, bytes, {3, 64}), weight.dequantized()), 1e-3);
}

TEST(GgufBlocks, SuperBlocksOfSixBitsFollowTheLayout) {
  // One value a time: sums of the formula in ggml's order.
  at::manual_seed(3);
  const Tensor bytes = at::randint(0, 256, {2 * 210}, at::kByte);
  for (int64_t block = 0; block < 2; ++block) bytes.narrow(0, block * 210 + 208, 2).copy_(at::tensor({0x66, 0x2e}));
  const auto* raw = bytes.const_data_ptr<uint8_t>();
  const Tensor values = gguf_values(GgufType::kQ6_K, bytes, {2, 256});
  const double d = bytes.narrow(0, 208, 2).clone().view(at::kHalf).item<double>();
  for (int64_t i = 0; i < 512; ++i) {
    const uint8_t* block = raw + i / 256 * 210;
    const int64_t half = i % 256 / 128, at = i % 128;
    const int low = block[half * 64 + at % 64] >> (at < 64 ? 0 : 4) & 15;
    const int high = block[128 + half * 32 + at % 32] >> (at / 32 * 2) & 3;
    const auto scale = static_cast<int8_t>(block[192 + half * 8 + at / 16]);
    EXPECT_NEAR(values.flatten()[i].item<double>(), d * scale * ((low | high << 4) - 32), 1e-4) << i;
  }
}

TEST(GgufBlocks, SizesThatBlocksDoNotDivideAndUnknownTypesAreRefused) {
  test::expect_error([] { gguf_num_bytes(GgufType::kQ8_0, {2, 33}); }, {"Q8_0", "33"});
  test::expect_error([] { gguf_num_bytes(static_cast<GgufType>(12), {2, 256}); }, {"type 12", "supported are"});
}

}  // namespace
}  // namespace baseq
