#include <gtest/gtest.h>

#include <numbers>

#include "../tiny_model.h"
#include "baseq/model/decoder_layer.h"

namespace baseq {
namespace {

using Type = RopeParameters::Type;

constexpr int64_t kHeadDim = 16, kTrained = 64;

Tensor frequencies(const RopeParameters& rope, int64_t seq_len = 8) {
  return rotary_frequencies(rope, kHeadDim, kTrained, seq_len).inverse;
}

TEST(RotaryFrequencies, OfAFactorOfOneAreTheDefault) {
  const Tensor plain = frequencies({});
  for (const Type type : {Type::kLinear, Type::kLlama3, Type::kYarn}) {
    const RopeParameters rope{.type = type, .factor = 1.0, .original_max_position_embeddings = kTrained};
    EXPECT_LT(test::relative_error(frequencies(rope, 4 * kTrained), plain), 1e-6) << static_cast<int>(type);
    EXPECT_EQ(rotary_frequencies(rope, kHeadDim, kTrained, 8).attention_factor, 1.0);
  }
}

TEST(RotaryFrequencies, OfLlama3AreKeptOrDividedOutsideTheBand) {
  const RopeParameters rope{.type = Type::kLlama3, .factor = 8.0, .original_max_position_embeddings = kTrained};
  const Tensor plain = frequencies({}), scaled = frequencies(rope);
  int64_t kept = 0, divided = 0, between = 0;
  for (int64_t i = 0; i < kHeadDim / 2; ++i) {
    const double before = plain[i].item<double>(), after = scaled[i].item<double>();
    const double wavelength = 2 * std::numbers::pi / before;
    if (wavelength < kTrained / rope.high_freq_factor) {
      EXPECT_EQ(after, before);
      ++kept;
    } else if (wavelength > kTrained / rope.low_freq_factor) {
      EXPECT_FLOAT_EQ(after, before / 8);
      ++divided;
    } else {
      EXPECT_TRUE(after < before && after > before / 8) << i;
      ++between;
    }
  }
  EXPECT_TRUE(kept > 0 && divided > 0 && between > 0);
}

TEST(RotaryFrequencies, OfDynamicAndLongropeAskForTheLength) {
  const RopeParameters dynamic{.type = Type::kDynamic, .factor = 4.0};
  EXPECT_TRUE(at::equal(frequencies(dynamic, kTrained), frequencies({})));
  const Tensor beyond = frequencies(dynamic, kTrained + 1), farther = frequencies(dynamic, 4 * kTrained);
  EXPECT_LT(beyond[7].item<double>(), frequencies({})[7].item<double>());
  EXPECT_LT(farther[7].item<double>(), beyond[7].item<double>());

  const RopeParameters longrope{.type = Type::kLongrope,
                                .factor = 4.0,
                                .original_max_position_embeddings = 32,
                                .short_factor = std::vector<double>(8, 1.0),
                                .long_factor = std::vector<double>(8, 2.0)};
  EXPECT_TRUE(at::equal(frequencies(longrope, 32), frequencies({})));
  EXPECT_TRUE(at::equal(frequencies(longrope, 33) * 2, frequencies({})));
  EXPECT_NEAR(rotary_frequencies(longrope, kHeadDim, 128, 8).attention_factor, std::sqrt(1 + 2.0 / 5.0), 1e-12);
}

TEST(RotaryEmbedding, KeepsNormsAndPassesWhatDoesNotTurn) {
  for (const double share : {1.0, 0.5}) {
    ModelConfig config;
    config.head_dim = kHeadDim;
    config.rope.partial_rotary_factor = share;
    const RotaryEmbedding rope = RotaryEmbedding::create(config, 12, at::kDouble);
    const int64_t turned = rope.cos.size(1);
    EXPECT_EQ(turned, static_cast<int64_t>(kHeadDim * share));
    const Tensor x = test::random_normal({2, 12, 3, kHeadDim}, 1), y = rope.forward(x);
    EXPECT_LT(test::relative_error(y.square().sum(-1), x.square().sum(-1)), 1e-6);
    EXPECT_TRUE(at::equal(y.narrow(-1, turned, kHeadDim - turned), x.narrow(-1, turned, kHeadDim - turned)));
    EXPECT_TRUE(at::equal(y.select(1, 0), x.select(1, 0))) << "position 0 does not turn";
    EXPECT_GT(test::relative_error(y.narrow(-1, 0, turned).select(1, 5), x.narrow(-1, 0, turned).select(1, 5)), 0.1);
  }
}

}  // namespace
}  // namespace baseq
