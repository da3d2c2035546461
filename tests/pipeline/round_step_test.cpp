#include "block_test.h"
#include "pipeline/merge.h"

namespace baseq {
namespace {

using Method = RoundStep::Method;

class RoundedBlock : public test::BlockTest {
 protected:
  RoundedBlock() { grids = test::grids_of_bits(4, shape); }

  /// Steps that differ in what they store.
  static std::vector<RoundStep> kinds_of_rounding() {
    const LowRankOptions correction{.rank = 2},
        fbquant{.method = LowRankOptions::Method::kFbquant, .rank = 2, .steps = 4};
    return {{},
            {.method = Method::kGptq},
            {.method = Method::kGptq, .compensate_streams = true, .quantized_inputs = true},
            {.method = Method::kGptq, .low_rank = correction},
            {.low_rank = fbquant}};
  }
};

/// A kernel computes integer products and then applies the token's scale and zero point, the weight's scales and its
/// row sums.
TEST_P(RoundedBlock, IntegerEpilogueEqualsTheFakeQuantizedProduct) {
  OpenBlock block = open_block({.points = test::corrected_points(config, 4)});
  run(block, {RoundStep{}});
  DecoderLayer quantized = block.take_layer();
  merge_corrections(quantized);
  const QuantPoint& point = quantized.mlp.down_input;
  const Linear& linear = quantized.mlp.down_proj;
  const Tensor input = test::random_normal({kSamples * kSeq, shape.intermediate_size}, 9, at::kFloat);

  const Tensor u = input * point.gain - point.shift;
  const QParams grid = compute_qparams(u, point.spec, point.clip);  // one scale and one zero point per token
  const Tensor codes = quantize(u, grid, point.spec).to(at::kLong);
  const QuantizedWeight& weight = *linear.quantized;
  const Tensor accumulated = at::matmul(codes, weight.codes.to(at::kLong).t());
  const Tensor row_sums = weight.codes.to(at::kLong).sum(1);
  const Tensor expected = grid.scale.to(at::kDouble) * (accumulated - grid.zero_point.to(at::kDouble) * row_sums) *
                              weight.qparams.scale.view({1, -1}).to(at::kDouble) +
                          linear.bias;
  EXPECT_LT(test::relative_error(linear.forward(point.forward(input)).to(at::kDouble), expected), 1e-5);
}

TEST_P(RoundedBlock, RoundingTwiceGivesTheSameCodes) {
  inputs.quantized = x + 0.02 * test::random_normal(x.sizes(), 4, at::kFloat);
  const std::vector<RoundStep> kinds = kinds_of_rounding();
  for (size_t i = 0; i < kinds.size(); ++i) {
    SCOPED_TRACE(i);
    OpenBlock block = open_block(test::with_hadamards(config, {Site::kValue, Site::kQueryKey, Site::kDown}));
    run(block, {PointsStep{.at = test::kInputSites, .clip = 0.9}});
    const BlockState before = block.state();
    const DecoderLayer exact = block.layer();
    run(block, {kinds[i]});
    const BlockState once = block.state();
    EXPECT_TRUE(has_codes(once));
    EXPECT_EQ(once.weights.size(), 7U);
    run(block, {kinds[i]});
    test::expect_same_state(block.state(), once);
    // Another kind of rounding in between leaves nothing of itself.
    run(block, {kinds[(i + 1) % kinds.size()], kinds[i]});
    test::expect_same_state(block.state(), once);
    // Without codes the weights are the exact ones, to the last bit.
    block.edit([](BlockState& state) { state.weights.clear(); });
    test::expect_same_state(block.state(), before);
    test::expect_same_layer(block.layer(), exact);
  }
}

TEST_P(RoundedBlock, CodesAreThoseOfTheExactWeightOnItsGrid) {
  OpenBlock block = open_block();
  const DecoderLayer exact = block.layer();
  run(block, {RoundStep{}});
  exact.for_each_linear([&](const std::string& name, const Linear& linear) {
    const QuantizedWeight expected = round_to_nearest(linear.weight, *grids.weights, true);
    EXPECT_TRUE(at::equal(block.state().weights.at(name).codes->codes, expected.codes)) << name;
    EXPECT_TRUE(at::equal(block.layer().linear(name).weight, expected.dequantized())) << name;
  });
}

TEST_P(RoundedBlock, FewTokensGiveTheCodesOfTheirMoments) {
  grids.weights = QuantSpec{.num_bits = 4};
  // One window of two tokens; the low-rank correction keeps the moments and does not touch the codes.
  inputs.quantized = inputs.full_precision = x.narrow(0, 0, 1).narrow(1, 0, 2).contiguous();
  inputs.rope = test::tiny_rope(shape, 2, dtype);
  weights = weights.narrow(0, 0, 1).narrow(1, 0, 2).contiguous();
  weights.select(1, 0).fill_(0.7);
  OpenBlock tokens = open_block(), moments = open_block();
  run(tokens, {RoundStep{.method = Method::kGptq}});
  run(moments, {RoundStep{.method = Method::kGptq, .low_rank = LowRankOptions{.rank = 1}}});
  for (const auto& [name, weight] : tokens.state().weights) {
    // Later linears see what the correction changed.
    if (input_site(name) != Site::kQkv) continue;
    EXPECT_TRUE(at::equal(weight.codes->codes, moments.state().weights.at(name).codes->codes)) << name;
  }
}

TEST_P(RoundedBlock, LearnedClipsOfWeightsDecideTheGridAndStay) {
  OpenBlock block = open_block();
  const DecoderLayer exact = block.layer();
  const Tensor clip = at::full({shape.intermediate_size, 1, 1}, 0.6);
  block.edit([&](BlockState& state) { state.weights["mlp.up_proj"].clip = clip; });
  run(block, {RoundStep{}});
  const WeightState& weight = block.state().weights.at("mlp.up_proj");
  const QParams grid = compute_qparams(exact.mlp.up_proj.weight, *grids.weights, clip);
  EXPECT_TRUE(at::equal(weight.codes->qparams.scale, grid.scale));
  EXPECT_TRUE(at::equal(weight.codes->codes, quantize(exact.mlp.up_proj.weight, grid, *grids.weights)));
  EXPECT_TRUE(at::equal(weight.clip, clip));
  const BlockState once = block.state();
  run(block, {RoundStep{}});
  test::expect_same_state(block.state(), once);
  test::expect_error([&] { run(block, {RoundStep{.method = Method::kGptq}}); }, {"round", "gptq", "clips"});
}

TEST_P(RoundedBlock, NeedsAGridAndInputs) {
  OpenBlock block = open_block();
  inputs = {};
  test::expect_error([&] { run(block, {RoundStep{.method = Method::kGptq}}); }, {"round", "calibration"});
  run(block, {RoundStep{}});
  grids.weights.reset();
  test::expect_error([&] { run(block, {RoundStep{}}); }, {"round", "weight grid"});
}

INSTANTIATE_TEST_SUITE_P(Shapes, RoundedBlock, testing::ValuesIn(test::tiny_shapes()), test::shape_name);

}  // namespace
}  // namespace baseq
