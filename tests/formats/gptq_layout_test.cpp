#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "../io/temp_directory.h"
#include "../quant/random_codes.h"
#include "formats/gptq/layout.h"

namespace baseq {
namespace {

using test::expect_error;

constexpr PackedLayout kAwq{.awq = true};
PackedLayout gptq(int64_t num_bits, int64_t version = 1) { return {.num_bits = num_bits, .version = version}; }

/// Bit `bit` of the words that one column of `packed` [words, columns] makes.
int64_t bit_of(const Tensor& packed, int64_t column, int64_t bit) {
  return (static_cast<uint32_t>(packed[bit / 32][column].item<int32_t>()) >> (bit % 32)) & 1;
}

TEST(GptqLayout, InputsFollowEachOtherBitByBit) {
  at::manual_seed(1);
  for (const int64_t num_bits : {2, 3, 4, 8}) {
    const Tensor codes = test::random_codes(5, 64, num_bits);
    const Tensor packed = gptq(num_bits).pack_codes(codes);
    ASSERT_EQ(packed.sizes(), (at::IntArrayRef{64 * num_bits / 32, 5}));
    ASSERT_TRUE(packed.is_contiguous());
    for (int64_t input = 0; input < 64; ++input) {
      int64_t value = 0;
      for (int64_t i = 0; i < num_bits; ++i) value |= bit_of(packed, 3, input * num_bits + i) << i;
      ASSERT_EQ(value, codes[3][input].item<int64_t>() + (1 << (num_bits - 1))) << num_bits << " " << input;
    }
    EXPECT_TRUE(at::equal(gptq(num_bits).unpack_codes(packed), codes));
  }
}

TEST(GptqLayout, ZeroPointsOfASymmetricGridAreTheKnownWords) {
  const Tensor zero = at::zeros({8, 3});
  EXPECT_TRUE(at::equal(gptq(4, 1).pack_zero_points(zero), at::full({3, 1}, 0x77777777, at::kInt)));
  EXPECT_TRUE(
      at::equal(gptq(4, 2).pack_zero_points(zero), at::full({3, 1}, static_cast<int32_t>(0x88888888), at::kInt)));
}

TEST(GptqLayout, ZeroPointsComeBack) {
  at::manual_seed(2);
  for (const int64_t num_bits : {2, 3, 4, 8}) {
    const PackedLayout first = gptq(num_bits, 1), second = gptq(num_bits, 2);
    const Tensor zero = test::random_codes(32, 3, num_bits).to(at::kFloat);
    EXPECT_TRUE(at::equal(second.unpack_zero_points(second.pack_zero_points(zero)), zero));
    const Tensor above = zero.clamp_min(1 - (1 << (num_bits - 1)));
    EXPECT_TRUE(at::equal(first.unpack_zero_points(first.pack_zero_points(above)), above));
  }
}

TEST(GptqLayout, VersionOneHasNoWordForTheLowestZeroPoint) {
  expect_error([] { gptq(4, 1).pack_zero_points(at::full({8, 1}, -8)); }, {"outside", "4 bits"});
}

TEST(GptqLayout, SizesThatDoNotFillAWordAreRefused) {
  expect_error([] { gptq(4).pack_codes(test::random_codes(4, 12, 4)); }, {"12 inputs of 4 bits"});
  expect_error([] { gptq(3).pack_codes(test::random_codes(4, 16, 3)); }, {"16 inputs of 3 bits"});
  expect_error([] { gptq(4, 2).pack_zero_points(at::zeros({12, 2})); }, {"12 outputs"});
  expect_error([] { kAwq.pack_codes(test::random_codes(12, 16, 4)); }, {"awq: 12 outputs of 4 bits"});
  expect_error([] { kAwq.pack_zero_points(at::zeros({12, 2})); }, {"awq: 12 outputs of 4 bits"});
}

TEST(AwqLayout, EightOutputsOfAWordAreInterleaved) {
  const Tensor codes = (at::arange(8, at::kChar) - 8).view({8, 1}).repeat({2, 3});  // unsigned 0 to 7
  const Tensor packed = kAwq.pack_codes(codes);
  EXPECT_TRUE(at::equal(packed, at::full({3, 2}, 0x75316420, at::kInt)));
  EXPECT_TRUE(at::equal(kAwq.pack_zero_points(codes.to(at::kFloat)), packed));
}

TEST(AwqLayout, CodesAndZeroPointsComeBack) {
  at::manual_seed(3);
  const Tensor codes = test::random_codes(24, 7, 4);
  EXPECT_TRUE(at::equal(kAwq.unpack_codes(kAwq.pack_codes(codes)), codes));
  const Tensor zero = codes.to(at::kFloat);
  EXPECT_TRUE(at::equal(kAwq.unpack_zero_points(kAwq.pack_zero_points(zero)), zero));
}

}  // namespace
}  // namespace baseq
