#include "pipeline/candidate.h"

#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "block_test.h"
#include "random_factors.h"

namespace baseq {
namespace {

using Kind = Factor::Kind;
using Phase = Candidate::Phase;
using Weights = LearnStep::Weights;

/// Blocks as functions of what is learned, in float64.
class CandidateOf : public test::BlockTest {
 protected:
  CandidateOf() : BlockTest(at::kDouble) { grids = test::grids_of_bits(8, shape); }

  static LearnStep step_of(Weights kind, const std::map<std::string, double>& rates) {
    return {.weights = kind, .rates = rates, .products = at::kDouble};
  }
  /// Random factors at a site; without a Hadamard factor no product is in float32.
  Transform chain(Site site, std::initializer_list<Kind> kinds) const {
    Transform result;
    uint64_t seed = 20 + uint64_t(site);
    for (const Kind kind : kinds) result.push_back(test::random_factor(kind, site, config, seed++));
    return result;
  }
  /// A point that is off and takes its shift away for good: with it paired transforms change the output, smoothly.
  QuantPoint shifting_point(Site site) const {
    const int64_t features = site_shape(site, config).features;
    return {.clip = at::full({site_shape(site, config).blocks, 1}, 0.9, at::kDouble),
            .shift = test::random_normal({features}, 70 + uint64_t(site)),
            .add_shift_back = false};
  }
  /// How far the output is from that of the layer. Here what is cut off adds up.
  Tensor error(const DecoderLayer& of) const { return (of.forward(x, inputs.rope) - target).square().mean(); }
  /// A scalar that depends on all of the output.
  Tensor observed(const DecoderLayer& of) const {
    const Tensor output = of.forward(x, inputs.rope);
    return (output * test::random_normal(output.sizes(), 90)).sum() / std::sqrt(double(output.numel()));
  }
  /// The heads mixed, each feature alike.
  Factor heads_factor() const {
    return left_kronecker_factor(test::invertible({shape.num_heads, shape.num_heads}, 5), shape.head_dim);
  }
  static std::vector<Tensor> random_directions(const std::vector<Tensor>& leaves) {
    std::vector<Tensor> directions;
    uint64_t seed = 50;
    for (const Tensor& leaf : leaves) directions.push_back(test::random_normal(leaf.sizes(), seed++));
    return directions;
  }
  static void move(const std::vector<Tensor>& leaves, const std::vector<Tensor>& directions, double distance) {
    const c10::NoGradGuard no_grad;
    for (size_t i = 0; i < leaves.size(); ++i) Tensor(leaves[i]).add_(directions[i], distance);
  }
  /// Compares the gradient of `f` along `directions` with the difference quotient.
  void expect_gradient(const std::vector<Tensor>& leaves, const std::vector<Tensor>& directions,
                       const std::function<Tensor()>& f, double tolerance, double distance) const {
    move(leaves, random_directions(leaves), 0.1);  // not where everything starts
    const auto moved = [&](double by) {
      const c10::NoGradGuard no_grad;
      move(leaves, directions, by);
      const double value = f().item<double>();
      move(leaves, directions, -by);
      return value;
    };
    const double expected = (moved(distance) - moved(-distance)) / (2 * distance);
    const at::AutoGradMode with_grad(true);
    f().backward();
    double got = 0;
    for (size_t i = 0; i < leaves.size(); ++i) {
      ASSERT_TRUE(leaves[i].grad().defined());
      got += (leaves[i].grad() * directions[i]).sum().item<double>();
    }
    EXPECT_GT(std::abs(expected), 1e-4) << "nothing depends on it";
    EXPECT_NEAR(got, expected, tolerance * std::abs(expected));
  }
  /// Compares a clip's gradient with a wide difference: a rounded value is constant between its jumps, and on a fine
  /// grid that cuts off much the jumps weigh little.
  void expect_gradient_of_clip(const BlockState& state, Weights kind, const std::string& name) {
    SCOPED_TRACE(name);
    OpenBlock block = open_block(state);
    const BlockTask given = task();
    const LearnStep step = step_of(kind, {{name, 1}});
    Candidate candidate(step, block, given);
    const std::vector<Tensor>& leaves = candidate.parameters().at(0).leaves;
    expect_gradient(
        leaves, {at::ones_like(leaves[0])}, [&] { return error(candidate.build(Phase::kLearning)); }, 0.1, 0.05);
  }
  void expect_gradients_of_candidate(const BlockState& state, const LearnStep& step, double tolerance) {
    OpenBlock block = open_block(state);
    const BlockTask given = task();
    for (const auto& [name, rate] : step.rates) {
      SCOPED_TRACE(name);
      LearnStep single = step;
      single.rates = {{name, rate}};
      Candidate candidate(single, block, given);
      ASSERT_EQ(candidate.parameters().size(), 1U);
      const std::vector<Tensor>& leaves = candidate.parameters()[0].leaves;
      expect_gradient(
          leaves, random_directions(leaves), [&] { return observed(candidate.build(Phase::kLearning)); }, tolerance,
          1e-5);
    }
    Candidate together(step, block, given);
    std::vector<Tensor> leaves;
    for (const Parameter& parameter : together.parameters()) {
      leaves.insert(leaves.end(), parameter.leaves.begin(), parameter.leaves.end());
    }
    expect_gradient(
        leaves, random_directions(leaves), [&] { return observed(together.build(Phase::kLearning)); }, tolerance, 1e-5);
  }
};

TEST_P(CandidateOf, GradientsOfTransformsAreDifferenceQuotients) {
  BlockState state{.transforms = {{Site::kQkv, chain(Site::kQkv, {Kind::kScale})},
                                  {Site::kValue, chain(Site::kValue, {Kind::kScale, Kind::kMatrix})},
                                  {Site::kO, chain(Site::kO, {Kind::kMatrix, Kind::kScale})},
                                  {Site::kGateUp, chain(Site::kGateUp, {Kind::kScale, Kind::kKronecker})},
                                  {Site::kDown, chain(Site::kDown, {Kind::kScale, Kind::kPermutation})}}};
  for (const Site site : {Site::kQkv, Site::kValue, Site::kO, Site::kGateUp, Site::kDown}) {
    state.points[site] = shifting_point(site);
  }
  expect_gradients_of_candidate(state,
                                step_of(Weights::kExact, {{"qkv.scale", 1},
                                                          {"value.scale", 1},
                                                          {"value.matrix", 1},
                                                          {"o.scale", 1},
                                                          {"gate_up.scale", 1},
                                                          {"down.scale", 1}}),
                                1e-6);
}

TEST_P(CandidateOf, GradientsOfFreeMatricesAreDifferenceQuotients) {
  BlockState state{.transforms = {{Site::kQkv, chain(Site::kQkv, {Kind::kKronecker})},
                                  {Site::kQueryKey, chain(Site::kQueryKey, {Kind::kMatrix})},
                                  {Site::kValue, chain(Site::kValue, {Kind::kMatrix})},
                                  {Site::kO, {heads_factor()}},
                                  {Site::kGateUp,
                                   {scale_factor(at::ones({shape.hidden_size}, at::kDouble)),
                                    matrix_factor(at::eye(shape.hidden_size, at::kDouble))}},
                                  {Site::kDown, chain(Site::kDown, {Kind::kScale, Kind::kKronecker})}}};
  for (const Site site : {Site::kQkv, Site::kValue, Site::kO, Site::kGateUp, Site::kDown}) {
    state.points[site] = shifting_point(site);
  }
  expect_gradients_of_candidate(state,
                                step_of(Weights::kExact, {{"qkv.kronecker", 1},
                                                          {"value.svd", 1},
                                                          {"o.kronecker", 1},
                                                          {"gate_up.band", 1},
                                                          {"down.kronecker", 1},
                                                          {"down.scale", 1}}),
                                1e-5);
  // Without a shift of the cache its transform drops out of the output.
  state.points[Site::kQueryKey] = shifting_point(Site::kQueryKey);
  state.points[Site::kQueryKey].shift.zero_();
  state.points[Site::kQueryKey].gain = 1 + 0.5 * test::random_normal({site_shape(Site::kQueryKey, config).features}, 3);
  expect_gradients_of_candidate(state, step_of(Weights::kExact, {{"query_key.svd", 1}}), 1e-5);
}

TEST_P(CandidateOf, GradientsOfShiftsAndGainsAreDifferenceQuotients) {
  BlockState state;
  LearnStep step = step_of(Weights::kExact, {});
  for (const Site site : test::kInputSites) {
    state.points[site] = shifting_point(site);
    for (const char* what : {".shift", ".gain"}) step.rates[std::string(site_info(site).name) + what] = 1;
  }
  state.points[Site::kValue] = shifting_point(Site::kValue);
  step.rates["v_cache.shift"] = 1;
  expect_gradients_of_candidate(state, step, 1e-6);
  // With weights that follow a transform as well.
  state.transforms[Site::kO] = chain(Site::kO, {Kind::kMatrix, Kind::kScale});
  step.rates["o.scale"] = 1;
  expect_gradients_of_candidate(state, step, 1e-6);
}

TEST_P(CandidateOf, GradientsOfClipsAreThoseOfWhatIsCut) {
  for (const Site site : {Site::kQkv, Site::kO, Site::kDown, Site::kValue}) {
    QuantPoint point{.enabled = true};
    point.spec = site_info(site).cache ? *grids.kv_cache : *grids.input_activations;
    point.clip = at::full({site_shape(site, config).blocks, 1}, 0.3, at::kDouble);
    expect_gradient_of_clip({.points = {{site, point}}}, Weights::kExact, point_name(site) + ".clip");
  }
}

TEST_P(CandidateOf, GradientsOfClipsOfWeightsAreThoseOfWhatIsCut) {
  for (const std::string name : {"self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj"}) {
    BlockState state;
    state.weights[name].clip = at::full({layer.linear(name).weight.size(0), 1, 1}, 0.3, at::kDouble);
    expect_gradient_of_clip(state, Weights::kStraightThrough, name + ".weight_clip");
  }
}

TEST_P(CandidateOf, WhateverItsTransformsBecomeTheUnquantizedOutputStays) {
  const BlockState state{
      .transforms = {{Site::kQkv, chain(Site::kQkv, {Kind::kScale, Kind::kMatrix})},
                     {Site::kValue, chain(Site::kValue, {Kind::kScale, Kind::kPermutation, Kind::kMatrix})},
                     {Site::kO, chain(Site::kO, {Kind::kScale})},
                     {Site::kGateUp, chain(Site::kGateUp, {Kind::kScale})},
                     {Site::kDown, chain(Site::kDown, {Kind::kPermutation, Kind::kScale, Kind::kMatrix})}}};
  OpenBlock block = open_block(state);
  const BlockTask given = task();
  for (const std::map<std::string, double>& rates :
       std::vector<std::map<std::string, double>>{{{"*.scale", 1}, {"*.matrix", 1}},
                                                  {{"down.scale", 1}},
                                                  {{"qkv.scale", 1}, {"value.matrix", 1}},
                                                  {{"gate_up.scale", 1}, {"down.scale", 1}}}) {
    SCOPED_TRACE(rates.begin()->first + std::to_string(rates.size()));
    LearnStep step = step_of(Weights::kExact, rates);
    if (rates.contains("*.matrix")) step.rates = {{"*.scale", 1}, {"value.matrix", 1}};
    Candidate candidate(step, block, given);
    EXPECT_TRUE(candidate.reaches_weights());
    for (const Parameter& parameter : candidate.parameters()) {
      move(parameter.leaves, random_directions(parameter.leaves), 0.3);
    }
    const c10::NoGradGuard no_grad;
    EXPECT_LT(test::relative_error(candidate.build(Phase::kMonitoring).forward(x, inputs.rope), target), 1e-10);
    const DecoderLayer result = realize(layer, candidate.result(), place);
    EXPECT_LT(test::relative_error(result.forward(x, inputs.rope), target), 1e-10);
    EXPECT_FALSE(result.mlp.down_scale.defined());
  }
}

TEST_P(CandidateOf, FreeMatricesKeepTheUnquantizedOutput) {
  const BlockState state{.transforms = {{Site::kQkv, chain(Site::kQkv, {Kind::kScale, Kind::kKronecker})},
                                        {Site::kQueryKey, {rotation_factor(at::eye(shape.head_dim, at::kDouble))}},
                                        {Site::kValue, chain(Site::kValue, {Kind::kScale, Kind::kMatrix})},
                                        {Site::kO, {heads_factor()}},
                                        {Site::kGateUp, chain(Site::kGateUp, {Kind::kScale, Kind::kKronecker})},
                                        {Site::kDown, chain(Site::kDown, {Kind::kScale, Kind::kKronecker})}}};
  OpenBlock block = open_block(state);
  const BlockTask given = task();
  for (const std::map<std::string, double>& rates : std::vector<std::map<std::string, double>>{
           {{"*.scale", 1}, {"*.kronecker", 1}, {"*.svd", 1}}, {{"query_key.svd", 1}}, {{"o.kronecker", 1}}}) {
    SCOPED_TRACE(rates.begin()->first);
    const LearnStep step = step_of(Weights::kExact, rates);
    Candidate candidate(step, block, given);
    EXPECT_TRUE(candidate.reaches_weights());
    for (const Parameter& parameter : candidate.parameters()) {
      move(parameter.leaves, random_directions(parameter.leaves), 0.3);
    }
    const c10::NoGradGuard no_grad;
    EXPECT_LT(test::relative_error(candidate.build(Phase::kMonitoring).forward(x, inputs.rope), target), 1e-9);
    const DecoderLayer result = realize(layer, candidate.result(), place);
    EXPECT_LT(test::relative_error(result.forward(x, inputs.rope), target), 1e-9);
  }
}

TEST_P(CandidateOf, WhatItBuildsIsWhatItsResultRealizes) {
  BlockState state{.transforms = {{Site::kValue, chain(Site::kValue, {Kind::kScale, Kind::kMatrix})},
                                  {Site::kO, chain(Site::kO, {Kind::kScale})}},
                   .points = test::corrected_points(config, 8)};
  const LearnStep step =
      step_of(Weights::kExact, {{"*.scale", 1}, {"value.matrix", 1}, {"*.clip", 1}, {"*.shift", 1}, {"*.gain", 1}});
  OpenBlock block = open_block(state);
  const BlockTask given = task();
  Candidate candidate(step, block, given);
  for (const Parameter& parameter : candidate.parameters()) {
    move(parameter.leaves, random_directions(parameter.leaves), 0.2);
  }
  const c10::NoGradGuard no_grad;
  const BlockState result = candidate.result();
  test::expect_same_layer(realize(layer, result, place), candidate.build(Phase::kMonitoring));
  for (const auto& [name, tensor] : state_tensors(result)) EXPECT_FALSE(tensor.requires_grad()) << name;
  // The state of the block is not touched.
  test::expect_same_state(block.state(), state);
}

TEST_P(CandidateOf, RoundedWeightsAreNotMoved) {
  OpenBlock block = open_block({.transforms = {{Site::kValue, chain(Site::kValue, {Kind::kScale, Kind::kMatrix})}}});
  run(block, {RoundStep{}});
  const BlockTask given = task();
  for (const char* name : {"value.scale", "value.matrix", "mlp.up_proj.weight_clip"}) {
    const LearnStep step = step_of(Weights::kRounded, {{name, 1}});
    test::expect_error([&] { Candidate(step, block, given); }, {name, "rounded"});
  }
}

TEST_P(CandidateOf, APointAloneReachesNoWeight) {
  OpenBlock block = open_block({.points = test::corrected_points(config, 4)});
  const LearnStep step = step_of(Weights::kRounded, {{"*.clip", 1}, {"*.gain", 1}});
  const BlockTask given = task();
  Candidate candidate(step, block, given);
  EXPECT_FALSE(candidate.reaches_weights());
  EXPECT_EQ(candidate.parameters().size(), 10U);
}

/// The same in float32, the dtype of corrections.
class CandidateWithCorrections : public test::BlockTest {};

TEST_P(CandidateWithCorrections, GradientsOfLowRankFactorsAreThoseOfTheirProduct) {
  OpenBlock block = open_block();
  const LowRankOptions low_rank{.method = LowRankOptions::Method::kSvd, .rank = 2, .dtype = at::kFloat};
  grids.weights = QuantSpec{.num_bits = 3};
  run(block, {RoundStep{.low_rank = low_rank}});
  const LearnStep step{.rates = {{"mlp.up_proj.low_rank", 1}}, .products = at::kFloat};
  const BlockTask given = task();
  Candidate candidate(step, block, given);
  const std::vector<Tensor>& leaves = candidate.parameters().at(0).leaves;
  const auto loss = [&](const DecoderLayer& of) { return (of.forward(x, inputs.rope) - target).square().mean(); };
  const at::AutoGradMode with_grad(true);
  const DecoderLayer built = candidate.build(Phase::kLearning);
  loss(built).backward();
  // The codes count as a constant.
  const Tensor rest = (built.mlp.up_proj.weight - at::matmul(leaves[1], leaves[0])).detach();
  Tensor a = leaves[0].detach().clone().requires_grad_(true);
  Tensor b = leaves[1].detach().clone().requires_grad_(true);
  DecoderLayer explicit_one = built.detach();
  explicit_one.mlp.up_proj.weight = rest + at::matmul(b, a);
  loss(explicit_one).backward();
  EXPECT_LT(test::relative_error(leaves[0].grad(), a.grad()), 1e-5);
  EXPECT_LT(test::relative_error(leaves[1].grad(), b.grad()), 1e-5);
}

INSTANTIATE_TEST_SUITE_P(Shapes, CandidateWithCorrections, testing::ValuesIn(test::tiny_shapes()), test::shape_name);

INSTANTIATE_TEST_SUITE_P(Shapes, CandidateOf, testing::ValuesIn(test::tiny_shapes()), test::shape_name);

}  // namespace
}  // namespace baseq
