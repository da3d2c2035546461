#include "baseq/quant/gptq_layout.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "../io/temp_directory.h"
#include "random_codes.h"

namespace baseq {
namespace {

using test::expect_error;

/// Bit `bit` of the words that one column of `packed` [words, columns] makes.
int64_t bit_of(const Tensor& packed, int64_t column, int64_t bit) {
  return (static_cast<uint32_t>(packed[bit / 32][column].item<int32_t>()) >> (bit % 32)) & 1;
}

TEST(GptqLayout, InputsFollowEachOtherBitByBit) {
  at::manual_seed(1);
  for (const int64_t num_bits : {2, 3, 4, 8}) {
    const Tensor codes = test::random_codes(5, 64, num_bits);
    const Tensor packed = pack_gptq_codes(codes, num_bits);
    ASSERT_EQ(packed.sizes(), (at::IntArrayRef{64 * num_bits / 32, 5}));
    ASSERT_TRUE(packed.is_contiguous());
    for (int64_t input = 0; input < 64; ++input) {
      int64_t value = 0;
      for (int64_t i = 0; i < num_bits; ++i) value |= bit_of(packed, 3, input * num_bits + i) << i;
      ASSERT_EQ(value, codes[3][input].item<int64_t>() + (1 << (num_bits - 1))) << num_bits << " " << input;
    }
    EXPECT_TRUE(at::equal(unpack_gptq_codes(packed, num_bits), codes));
  }
}

TEST(GptqLayout, ZeroPointsOfASymmetricGridAreTheKnownWords) {
  const Tensor zero = at::zeros({8, 3});
  EXPECT_TRUE(at::equal(pack_gptq_zero_points(zero, 4, GptqVersion::kV1), at::full({3, 1}, 0x77777777, at::kInt)));
  EXPECT_TRUE(at::equal(pack_gptq_zero_points(zero, 4, GptqVersion::kV2),
                        at::full({3, 1}, static_cast<int32_t>(0x88888888), at::kInt)));
}

TEST(GptqLayout, ZeroPointsComeBack) {
  at::manual_seed(2);
  for (const int64_t num_bits : {2, 3, 4, 8}) {
    const Tensor zero = test::random_codes(32, 3, num_bits).to(at::kFloat);
    EXPECT_TRUE(at::equal(
        unpack_gptq_zero_points(pack_gptq_zero_points(zero, num_bits, GptqVersion::kV2), num_bits, GptqVersion::kV2),
        zero));
    const Tensor above = zero.clamp_min(1 - (1 << (num_bits - 1)));
    EXPECT_TRUE(at::equal(
        unpack_gptq_zero_points(pack_gptq_zero_points(above, num_bits, GptqVersion::kV1), num_bits, GptqVersion::kV1),
        above));
  }
}

TEST(GptqLayout, VersionOneHasNoWordForTheLowestZeroPoint) {
  expect_error([] { pack_gptq_zero_points(at::full({8, 1}, -8), 4, GptqVersion::kV1); }, {"outside", "4 bits"});
}

TEST(GptqLayout, SizesThatDoNotFillAWordAreRefused) {
  expect_error([] { pack_gptq_codes(test::random_codes(4, 12, 4), 4); }, {"12 inputs of 4 bits"});
  expect_error([] { pack_gptq_codes(test::random_codes(4, 16, 3), 3); }, {"16 inputs of 3 bits"});
  expect_error([] { pack_gptq_zero_points(at::zeros({12, 2}), 4, GptqVersion::kV2); }, {"12 outputs"});
  expect_error([] { pack_awq_codes(test::random_codes(12, 16, 4)); }, {"12 outputs", "8"});
  expect_error([] { pack_awq_zero_points(at::zeros({12, 2})); }, {"12 outputs", "8"});
}

TEST(AwqLayout, EightOutputsOfAWordAreInterleaved) {
  const Tensor codes = (at::arange(8, at::kChar) - 8).view({8, 1}).repeat({2, 3});  // unsigned 0 to 7
  const Tensor packed = pack_awq_codes(codes);
  EXPECT_TRUE(at::equal(packed, at::full({3, 2}, 0x75316420, at::kInt)));
  EXPECT_TRUE(at::equal(pack_awq_zero_points(codes.to(at::kFloat)), packed));
}

TEST(AwqLayout, CodesAndZeroPointsComeBack) {
  at::manual_seed(3);
  const Tensor codes = test::random_codes(24, 7, 4);
  EXPECT_TRUE(at::equal(unpack_awq_codes(pack_awq_codes(codes)), codes));
  const Tensor zero = codes.to(at::kFloat);
  EXPECT_TRUE(at::equal(unpack_awq_zero_points(pack_awq_zero_points(zero)), zero));
}

}  // namespace
}  // namespace baseq
