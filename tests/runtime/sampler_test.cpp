#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <string>

#include "../random_tensors.h"
#include "baseq/runtime/generate.h"

namespace baseq {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

Tensor logits_of(const std::vector<double>& values) { return at::tensor(values, at::kFloat); }

// Philox4x32-10 as its paper gives it.
std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0], b = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    key = {key[0] + 0x9E3779B9, key[1] + 0xBB67AE85};
  }
  return counter;
}

double unit_of(uint32_t high, uint32_t low) {
  return static_cast<double>((uint64_t{high} << 32 | low) >> 11) / 9007199254740992.0;
}

// The token that a draw `unit` means, from the definitions: float64 throughout, everything sorted.
int32_t expected_token(const Tensor& logits, const SamplingOptions& options, double unit) {
  const Tensor scaled = logits.to(at::kDouble) / options.temperature;
  const auto [sorted, order] = scaled.sort(/*stable=*/true, /*dim=*/0, /*descending=*/true);
  const int64_t count = options.top_k > 0 ? std::min(options.top_k, sorted.numel()) : sorted.numel();
  const Tensor probabilities = at::softmax(sorted.narrow(0, 0, count), 0);
  const Tensor before = probabilities.cumsum(0) - probabilities;
  const Tensor kept =
      before.lt(options.top_p).logical_and(probabilities.ge(options.min_p * probabilities[0].item<double>()));
  Tensor by_id = at::zeros_like(scaled);
  by_id.index_put_({order.narrow(0, 0, count)}, probabilities * kept);
  const Tensor cumulative = (by_id / by_id.sum()).cumsum(0);
  return cumulative.le(unit).sum().item<int32_t>();
}

TEST(Sampler, DrawsAreThoseOfPhilox) {
  EXPECT_EQ(philox({}, {}), (std::array<uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(random_unit(0, 0), unit_of(0x6627e8d5, 0xe169c58d));
  std::mt19937_64 random(1);
  for (int i = 0; i < 100; ++i) {
    const uint64_t seed = random(), position = random();
    const auto [high, low, c, d] =
        philox({0, 0, static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32)},
               {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
    EXPECT_EQ(random_unit(seed, position), unit_of(high, low));
  }
}

TEST(Sampler, TemperatureZeroTakesTheLowestIdOfTheMostProbable) {
  const std::vector<int32_t> none;
  EXPECT_EQ(sample(logits_of({1, 3, 2, 3}), none, {.temperature = 0}), 1);
  EXPECT_EQ(sample(logits_of({-kInfinity, -kInfinity}), none, {.temperature = 0}), 0);
}

TEST(Sampler, EachDrawIsTheOneThatTheDefinitionsGive) {
  const std::vector<int32_t> sequence(400);
  for (const SamplingOptions& options :
       {SamplingOptions{.seed = 3}, SamplingOptions{.temperature = 0.6, .seed = 4}, SamplingOptions{.top_k = 5},
        SamplingOptions{.temperature = 2.5, .top_p = 0.7}, SamplingOptions{.min_p = 0.2, .seed = 9},
        SamplingOptions{.temperature = 0.9, .top_k = 40, .top_p = 0.8, .min_p = 0.05, .seed = UINT64_MAX}}) {
    for (size_t position = 0; position < sequence.size(); ++position) {
      const Tensor logits = 3 * test::random_normal({500}, position).to(at::kFloat);
      const std::span<const int32_t> before(sequence.data(), position);
      EXPECT_EQ(sample(logits, before, options), expected_token(logits, options, random_unit(options.seed, position)))
          << "position " << position;
    }
  }
}

TEST(Sampler, FrequenciesAreTheProbabilities) {
  const Tensor logits = logits_of({0, 1, 2, -1, 0.5});
  const Tensor probabilities = at::softmax(logits.to(at::kDouble), 0);
  constexpr int kDraws = 20000;
  const std::vector<int32_t> sequence(kDraws);
  std::vector<int> counts(5);
  for (size_t i = 0; i < kDraws; ++i) ++counts[static_cast<size_t>(sample(logits, {sequence.data(), i}, {.seed = 7}))];
  for (size_t id = 0; id < counts.size(); ++id) {
    const double p = probabilities[static_cast<int64_t>(id)].item<double>();
    EXPECT_NEAR(counts[id], kDraws * p, 4 * std::sqrt(kDraws * p * (1 - p))) << "token " << id;
  }
}

TEST(Sampler, OfEqualLogitsTheLowerIdStays) {
  const std::vector<int32_t> sequence(200);
  for (size_t i = 0; i < sequence.size(); ++i) {
    EXPECT_LE(sample(logits_of({1, 1, 1, 1}), {sequence.data(), i}, {.top_k = 2}), 1);
    EXPECT_LE(sample(logits_of({1, 1, 1, 1}), {sequence.data(), i}, {.top_p = 0.5}), 1);
  }
}

TEST(Sampler, RepetitionPenaltyLowersWhatIsThereWhateverItsSign) {
  const std::vector<int32_t> sequence{1, 1, 3};
  const SamplingOptions greedy{.temperature = 0, .repetition_penalty = 2};
  EXPECT_EQ(sample(logits_of({2.1, 4, 0, 0}), sequence, greedy), 0);
  EXPECT_EQ(sample(logits_of({1.9, 4, 0, 0}), sequence, greedy), 1);
  EXPECT_EQ(sample(logits_of({-1.5, -1, -9, -0.8}), sequence, greedy), 0);
  EXPECT_EQ(sample(logits_of({-1.7, -1, -9, -0.8}), sequence, greedy), 3);
}

TEST(Sampler, OneTokenStaysWhateverTheLimits) {
  const std::vector<int32_t> sequence(1);
  EXPECT_EQ(sample(logits_of({0, 1, 0}), sequence, {.top_p = 0}), 1);
  EXPECT_EQ(sample(logits_of({0, 1, 0}), sequence, {.min_p = 1}), 1);
  EXPECT_EQ(sample(logits_of({0, 1, 0}), sequence, {.top_k = 1}), 1);
  EXPECT_EQ(sample(logits_of({0, -kInfinity, -kInfinity}), sequence, {}), 0);
  EXPECT_EQ(sample(logits_of({0, 200, 0}), sequence, {.temperature = 1e-3}), 1);
}

TEST(Sampler, RefusesLogitsThatAreNotFiniteAndOptionsOutOfRange) {
  const std::vector<int32_t> sequence(5);
  EXPECT_THROW(sample(logits_of({0, std::nan("")}), sequence, {}), c10::Error);
  EXPECT_THROW(sample(logits_of({0, kInfinity}), sequence, {.temperature = 0}), c10::Error);
  EXPECT_THROW(sample(at::zeros({2, 2}), sequence, {}), c10::Error);
  for (const SamplingOptions& options :
       {SamplingOptions{.temperature = -1}, SamplingOptions{.top_k = -1}, SamplingOptions{.top_p = 1.5},
        SamplingOptions{.min_p = std::nan("")}, SamplingOptions{.repetition_penalty = 0}}) {
    EXPECT_THROW(options.check(), c10::Error);
  }
}

TEST(Sampler, LogProbabilitiesAreThoseOfLogSoftmax) {
  const Tensor logits = 4 * test::random_normal({300}, 5).to(at::kFloat);
  const Tensor expected = at::log_softmax(logits.to(at::kDouble), 0);
  const TokenLogprobs found = token_logprobs(logits, 17, 4);
  EXPECT_EQ(found.id, 17);
  EXPECT_NEAR(found.logprob, expected[17].item<double>(), 1e-9);
  const auto [values, ids] = expected.topk(4);
  ASSERT_EQ(found.top.size(), 4U);
  for (int64_t i = 0; i < 4; ++i) {
    EXPECT_EQ(found.top[static_cast<size_t>(i)].first, ids[i].item<int32_t>());
    EXPECT_NEAR(found.top[static_cast<size_t>(i)].second, values[i].item<double>(), 1e-9);
  }
  EXPECT_EQ(token_logprobs(logits_of({1, 2}), 0, 10).top.size(), 2U);
}

}  // namespace
}  // namespace baseq
