#include <algorithm>
#include <cmath>

#include "block_test.h"
#include "random_factors.h"

namespace baseq {
namespace {

using Shift = PointsStep::Shift;

class PointsOn : public test::BlockTest {
 protected:
  PointsOn() { grids = test::grids_of_bits(4, shape); }

  static std::vector<Step> at_means() {
    return {PointsStep{.at = test::kInputSites, .clip = 0.9, .shift = Shift::kMean},
            PointsStep{.at = test::kCacheSites, .shift = Shift::kMean}};
  }
};

TEST_P(PointsOn, StartAtTheMeansOfWhatTheySee) {
  OpenBlock block = open_block(test::with_hadamards(config, {Site::kValue, Site::kQueryKey, Site::kDown}));
  const DecoderLayer probe = block.layer();
  run(block, at_means());
  const DecoderLayer& started = block.layer();
  const Tensor qkv = probe.input_of(Site::kQkv, x, inputs.rope);
  EXPECT_LT(test::relative_error(started.self_attn.v_cache.shift, probe.self_attn.v_proj.forward(qkv).mean({0, 1})),
            1e-5);
  for (const SiteInfo& info : sites()) {
    if (info.point.empty()) continue;
    const QuantPoint& point = started.point(info.site);
    EXPECT_TRUE(point.enabled) << info.name;
    EXPECT_EQ(point.spec, info.cache ? *grids.kv_cache : *grids.input_activations) << info.name;
    const int64_t groups = info.cache ? shape.num_kv_heads : 1;
    EXPECT_TRUE(at::equal(point.clip, at::full({groups, 1}, info.cache ? 1.0 : 0.9))) << info.name;
    EXPECT_EQ(point.add_shift_back, info.site != Site::kQueryKey) << info.name;
    if (info.cache) continue;
    const Tensor mean = probe.input_of(info.site, x, inputs.rope).mean({0, 1});
    EXPECT_LT(test::relative_error(point.shift, mean), 1e-5) << info.name;
  }
}

TEST_P(PointsOn, MeansSeeThroughGains) {
  // A gain on o's input that o_proj divides out leaves every later mean where it was.
  const Tensor gain = (0.7 * test::random_normal({shape.num_heads * shape.head_dim}, 21, at::kFloat)).exp();
  OpenBlock plain = open_block(), scaled = open_block({.transforms = {{Site::kO, {scale_factor(gain)}}}});
  run(plain, at_means());
  run(scaled, at_means());
  const auto shift = [](OpenBlock& of, Site site) { return of.layer().point(site).shift; };
  EXPECT_TRUE(at::equal(scaled.layer().self_attn.o_input.gain, gain));
  EXPECT_LT(test::relative_error(shift(scaled, Site::kGateUp), shift(plain, Site::kGateUp)), 1e-4);
  EXPECT_LT(test::relative_error(shift(scaled, Site::kDown), shift(plain, Site::kDown)), 1e-4);
  EXPECT_LT(test::relative_error(shift(scaled, Site::kO), gain * shift(plain, Site::kO)), 1e-4);
}

TEST_P(PointsOn, StepsInAnyOrderSeeTheSameMeans) {
  inputs.quantized = x + 0.1;
  for (const Stream stream : {Stream::kFullPrecision, Stream::kQuantized}) {
    OpenBlock forwards = open_block(), backwards = open_block();
    for (const Site site : test::kInputSites) {
      run(forwards, {PointsStep{.at = {site}, .shift = Shift::kMean, .stream = stream}});
    }
    for (auto site = test::kInputSites.rbegin(); site != test::kInputSites.rend(); ++site) {
      run(backwards, {PointsStep{.at = {*site}, .shift = Shift::kMean, .stream = stream}});
    }
    test::expect_same_state(forwards.state(), backwards.state());
    const Tensor mean = layer.input_of(Site::kQkv, task().stream(stream), inputs.rope).mean({0, 1});
    EXPECT_LT(test::relative_error(forwards.state().points.at(Site::kQkv).shift, mean), 1e-5);
  }
}

TEST_P(PointsOn, ALaterTransformChangesTheMeans) {
  OpenBlock block = open_block();
  run(block, {PointsStep{.at = {Site::kQkv}, .shift = Shift::kMean}, TransformStep{.at = {Site::kDown}},
              PointsStep{.at = {Site::kDown}, .shift = Shift::kMean}});
  const DecoderLayer probe = realize(layer, test::with_hadamards(config, {Site::kDown}), place);
  EXPECT_LT(test::relative_error(block.state().points.at(Site::kDown).shift,
                                 probe.input_of(Site::kDown, x, inputs.rope).mean({0, 1})),
            1e-5);
}

TEST_P(PointsOn, LearnedGainsChangeTheMeansWhetherOrNotTheRunWasInterrupted) {
  const LearnStep learn{.rates = {{"*.gain", 0.1}}, .products = at::kFloat};
  const PointsStep first{.at = {Site::kQkv, Site::kO, Site::kGateUp}, .clip = 0.7, .shift = Shift::kMean};
  const PointsStep last{.at = {Site::kDown}, .shift = Shift::kMean};
  OpenBlock whole = open_block();
  whole.moments(task(), Stream::kFullPrecision, Site::kDown);  // as a step at a later site has measured
  run(whole, {first, learn});
  ASSERT_LT(stages.back().loss_after, stages.back().loss_before);
  OpenBlock resumed = open_block(whole.state());
  run(whole, {last});
  run(resumed, {last});
  test::expect_same_state(resumed.state(), whole.state());
}

TEST_P(PointsOn, WithoutAGridAreRefused) {
  grids = {};
  OpenBlock block = open_block();
  test::expect_error([&] { run(block, {PointsStep{.at = {Site::kDown}}}); }, {"points", "grid", "down"});
  test::expect_error([&] { run(block, {PointsStep{.at = {Site::kValue}}}); }, {"points", "grid", "value"});
  EXPECT_TRUE(block.state().points.empty());
}

TEST_P(PointsOn, SmoothedAtRunTimeGiveAPrefixTheSameOutputOnlyWhereTheyAreCausal) {
  for (const RuntimeSmooth::Span span : {RuntimeSmooth::Span::kCausal, RuntimeSmooth::Span::kWindow}) {
    OpenBlock block = open_block();
    run(block, {PointsStep{.at = test::kInputSites, .runtime = RuntimeSmooth{.group = 4, .span = span}}});
    const DecoderLayer smoothed = block.layer().to(at::kDouble);
    const Tensor tokens = x.to(at::kDouble), whole = smoothed.forward(tokens, test::tiny_rope(shape, kSeq));
    double largest = 0;
    for (const int64_t length : {int64_t{1}, int64_t{5}, kSeq - 1}) {
      const Tensor prefix = smoothed.forward(tokens.narrow(1, 0, length), test::tiny_rope(shape, length));
      largest = std::max(largest, test::relative_error(prefix, whole.narrow(1, 0, length)));
    }
    EXPECT_EQ(largest < 1e-9, span == RuntimeSmooth::Span::kCausal) << largest;
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, PointsOn, testing::ValuesIn(test::tiny_shapes()), test::shape_name);

/// Gaussian tokens with channel means m: subtracting m takes the share rho / (1 + rho) out of the energy of a token,
/// rho = mean(m^2) / sigma^2, and the squared step of a grid with one scale a token falls with it.
TEST(MeanShift, LowersTheRoundingErrorByItsShareOfTheEnergy) {
  constexpr int64_t kTokens = 400, kFeatures = 1024;
  const QuantSpec spec{.num_bits = 4, .symmetric = false, .strategy = Strategy::kToken, .dynamic = true};
  const Tensor noise = test::random_normal({kTokens, kFeatures}, 1, at::kFloat);
  for (const double rho : {0.25, 1.0, 3.0}) {
    // Means as a Hadamard transform leaves them: Gaussian over the channels.
    const Tensor direction = test::random_normal({kFeatures}, 2, at::kFloat);
    const Tensor mean = direction * std::sqrt(rho / direction.square().mean().item<double>());
    const Tensor x = noise + mean;
    const auto error = [&](const Tensor& shift) {
      return (fake_quantize_dynamic(x, spec, {}, {}, shift, /*add_shift_back=*/true) - x).square().mean();
    };
    const double ratio = (error(x.mean(0)) / error({})).item<double>();
    EXPECT_NEAR(ratio * (1 + rho), 1.0, 0.1) << "rho " << rho;
  }
}

}  // namespace
}  // namespace baseq
