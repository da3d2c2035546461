#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "../io/temp_directory.h"
#include "baseq/quant/quantize.h"
#include "random_codes.h"

namespace baseq {
namespace {

std::vector<uint32_t> words(const Tensor& packed) {
  const auto* data = packed.const_data_ptr<int32_t>();
  return {data, data + packed.numel()};
}

TEST(Pack, FourBitsMatchTheGoldenVector) {
  const Tensor codes = at::arange(-8, 8, at::kChar).view({1, 16});
  EXPECT_EQ(words(pack_to_int32(codes, 4)), (std::vector<uint32_t>{0x76543210, 0xfedcba98}));
}

TEST(Pack, ThreeBitsCrossWordBoundaries) {
  const Tensor codes = (at::arange(32) % 8 - 4).to(at::kChar).view({1, 32});
  EXPECT_EQ(words(pack_to_int32(codes, 3)), (std::vector<uint32_t>{0x88fac688, 0xc688fac6, 0xfac688fa}));
}

TEST(Pack, EightBitsMatchTheGoldenVector) {
  const Tensor codes = at::tensor({-128, -1, 0, 127}, at::kChar).view({1, 4});
  EXPECT_EQ(words(pack_to_int32(codes, 8)), (std::vector<uint32_t>{0xff807f00}));
}

TEST(Pack, UnpackInvertsPackForEveryWidthAndAnyColumnCount) {
  at::manual_seed(1);
  for (int64_t num_bits = 1; num_bits <= 8; ++num_bits) {
    for (const int64_t columns : {1, 7, 31, 32, 33, 100, 255}) {
      const Tensor codes = test::random_codes(5, columns, num_bits);
      const Tensor packed = pack_to_int32(codes, num_bits);
      ASSERT_EQ(packed.size(1), (columns * num_bits + 31) / 32);
      ASSERT_TRUE(at::equal(unpack_from_int32(packed, num_bits, columns), codes)) << num_bits << " " << columns;
    }
  }
}

TEST(Pack, BitsFollowTheDenseStreamBitByBit) {
  at::manual_seed(2);
  for (int64_t num_bits = 2; num_bits <= 8; ++num_bits) {
    const Tensor codes = test::random_codes(1, 45, num_bits);
    const std::vector<uint32_t> packed = words(pack_to_int32(codes, num_bits));
    for (int64_t i = 0; i < 45; ++i) {
      for (int64_t bit = 0; bit < num_bits; ++bit) {
        const int64_t at = i * num_bits + bit;
        const int64_t expected = ((codes[0][i].item<int64_t>() + (1 << (num_bits - 1))) >> bit) & 1;
        ASSERT_EQ((packed[at / 32] >> (at % 32)) & 1, expected);
      }
    }
  }
}

TEST(Pack, UnusedBitsOfTheLastWordAreZero) {
  const Tensor codes = at::full({1, 3}, 3, at::kChar);
  EXPECT_EQ(words(pack_to_int32(codes, 3)), (std::vector<uint32_t>{0b111111111}));
}

TEST(Pack, EmptyTensorsPass) {
  EXPECT_EQ(pack_to_int32(at::empty({0, 8}, at::kChar), 4).sizes(), (at::IntArrayRef{0, 1}));
  EXPECT_EQ(unpack_from_int32(at::empty({3, 0}, at::kInt), 4, 0).sizes(), (at::IntArrayRef{3, 0}));
}

TEST(Pack, ThrowsWhenACodeDoesNotFitOrTheShapeIsWrong) {
  EXPECT_THROW(pack_to_int32(at::full({1, 4}, 8, at::kChar), 4), c10::Error);
  EXPECT_THROW(pack_to_int32(at::full({1, 4}, -9, at::kChar), 4), c10::Error);
  EXPECT_THROW(pack_to_int32(at::zeros({4}, at::kChar), 4), c10::Error);
  EXPECT_THROW(pack_to_int32(at::zeros({1, 4}, at::kInt), 4), c10::Error);
  EXPECT_THROW(pack_to_int32(at::zeros({1, 4}, at::kChar), 9), c10::Error);
  EXPECT_THROW(unpack_from_int32(at::zeros({1, 2}, at::kInt), 4, 8), c10::Error);
}

TEST(Pack, NumbersOfColumnsWhoseBitsWrapAreRefused) {
  // 4 (2^62 + 8) is 32 modulo 2^64: one word.
  for (const auto& [bits, columns] : std::vector<std::pair<int64_t, int64_t>>{
           {4, (int64_t{1} << 62) + 8}, {8, (int64_t{1} << 61) + 4}, {2, INT64_MAX}, {1, INT64_MAX}}) {
    const std::string message = test::error_of([&] { unpack_from_int32(at::zeros({1, 1}, at::kInt), bits, columns); });
    EXPECT_NE(message.find("for " + std::to_string(columns) + " columns"), message.npos) << message;
  }
}

TEST(Pack, ZeroPointsGoAlongTheRowsAndComeBack) {
  const Tensor zero_points = at::randint(-4, 4, {13, 5}, at::kFloat);
  const Tensor packed = pack_zero_points(zero_points, 3);
  EXPECT_EQ(packed.sizes(), (at::IntArrayRef{2, 5}));
  EXPECT_TRUE(
      at::equal(packed.select(1, 2), pack_to_int32(zero_points.select(1, 2).to(at::kChar).view({1, 13}), 3)[0]));
  EXPECT_TRUE(at::equal(unpack_zero_points(packed, 3, 13), zero_points));
}

}  // namespace
}  // namespace baseq
