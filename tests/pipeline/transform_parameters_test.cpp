#include "pipeline/transform_parameters.h"

#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include "block_test.h"
#include "random_factors.h"

namespace baseq {
namespace {

using Kind = Factor::Kind;

TEST(BandMask, WidensFromTheDiagonal) {
  const auto count = [](int64_t epoch) { return band_mask(6, epoch, 4).sum().item<int64_t>(); };
  // m(e) = floor(5 / 3 e) + 1 = 1, 2, 4, 6 of six places.
  EXPECT_EQ(count(0), 6 + 2 * 5);
  EXPECT_EQ(count(1), 6 + 2 * (5 + 4));
  EXPECT_EQ(count(2), 6 + 2 * (5 + 4 + 3 + 2));
  EXPECT_EQ(count(3), 36);
  const Tensor first = band_mask(6, 0, 4).to(at::kLong);
  EXPECT_TRUE(at::equal(first[0], at::tensor({1, 1, 0, 0, 0, 0}, at::kLong)));
  EXPECT_TRUE(at::equal(first[2], at::tensor({0, 1, 1, 1, 0, 0}, at::kLong)));
  EXPECT_TRUE(band_mask(6, 0, 1).all().item<bool>());
  EXPECT_TRUE(band_mask(1, 0, 5).all().item<bool>());
}

TEST(DiagonallyDominant, IsKeptAndRestored) {
  const Tensor kept = at::eye(4, at::kDouble) + 0.2 * at::ones({4, 4}, at::kDouble);
  EXPECT_TRUE(at::equal(diagonally_dominant(kept), kept));
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const Tensor wild = 5 * test::random_normal({3, 6, 6}, seed), tamed = diagonally_dominant(wild);
    const Tensor diagonal = tamed.diagonal(0, -2, -1).abs();
    EXPECT_TRUE((tamed.abs().sum(-1) - diagonal).lt(diagonal).all().item<bool>()) << seed;
    EXPECT_TRUE(at::equal(tamed.diagonal(0, -2, -1), wild.diagonal(0, -2, -1)));
    const Tensor smallest = std::get<1>(at::linalg_svd(tamed)).amin(-1);
    EXPECT_TRUE(smallest.gt(0).all().item<bool>()) << seed;
  }
}

class TransformLeaves : public test::BlockTest {
 protected:
  TransformLeaves() : BlockTest(at::kDouble) { grids = test::grids_of_bits(4, shape); }

  std::vector<Parameter> make(const BlockState& state, const std::map<std::string, double>& rates) const {
    return make_parameters({.name = "some step", .rates = rates}, state, place, grids);
  }
  /// A dominant, an orthogonal and a general matrix at different sites, and both forms of Kronecker factors.
  BlockState rich_state() const {
    const int64_t heads = shape.num_heads, dim = shape.head_dim, hidden = shape.hidden_size;
    const Tensor rotation = cayley(test::random_normal({dim, dim}, 3));
    return {.transforms = {{Site::kQkv, {test::random_factor(Kind::kKronecker, Site::kQkv, config, 5)}},
                           {Site::kQueryKey, {rotation_factor(rotation)}},
                           {Site::kValue, {test::random_factor(Kind::kMatrix, Site::kValue, config, 6)}},
                           {Site::kO, {left_kronecker_factor(test::invertible({heads, heads}, 7), dim)}},
                           {Site::kGateUp, {matrix_factor(2 * at::eye(hidden, at::kDouble))}}}};
  }
  static void expect_inverses(const BlockState& state, double tolerance) {
    for (const auto& [site, transform] : state.transforms) {
      for (const Factor& factor : transform) {
        for (const auto& [part, inverse] :
             {std::pair{factor.left, factor.left_inverse}, std::pair{factor.right, factor.right_inverse}}) {
          if (!part.defined() || !inverse.defined()) continue;
          const Tensor product = at::matmul(part, inverse);
          const Tensor error = product - at::eye(part.size(-1), part.options());
          EXPECT_LT(error.abs().max().item<double>(), tolerance) << site_info(site).name;
        }
      }
    }
  }
  const std::map<std::string, double> all = {
      {"*.kronecker", 1}, {"query_key.svd", 1}, {"value.svd", 1}, {"gate_up.band", 1}};
};

TEST_P(TransformLeaves, BeginAtTheValuesOfTheState) {
  const BlockState state = rich_state();
  BlockState written = state;
  const std::vector<Parameter> parameters = make(state, all);
  ASSERT_EQ(parameters.size(), 5U);
  for (const Parameter& parameter : parameters) {
    for (const Tensor& leaf : parameter.leaves) {
      EXPECT_TRUE(leaf.is_leaf() && leaf.requires_grad()) << parameter.name;
    }
    EXPECT_TRUE(parameter.moves);
    parameter.write(written);
  }
  const auto got = state_tensors(written), expected = state_tensors(state);
  for (const auto& [name, tensor] : expected) {
    if (tensor.is_floating_point()) {
      EXPECT_TRUE(at::allclose(got.at(name), tensor, 1e-10, 1e-11)) << name;
    }
  }
  expect_inverses(written, 1e-10);
}

TEST_P(TransformLeaves, WhateverTheyBecomeHasItsInverse) {
  BlockState state = rich_state();
  const std::vector<Parameter> parameters = make(state, all);
  const c10::NoGradGuard no_grad;
  uint64_t seed = 11;
  for (const Parameter& parameter : parameters) {
    for (const Tensor& leaf : parameter.leaves) Tensor(leaf).copy_(test::random_normal(leaf.sizes(), seed++));
    parameter.write(state);
  }
  expect_inverses(state, 1e-8);
  EXPECT_FALSE(state.transforms.at(Site::kO)[0].right.defined());
}

TEST_P(TransformLeaves, ABandGrowsAndNeverLosesWhatItHad) {
  BlockState state = rich_state();
  const std::vector<Parameter> parameters = make(state, {{"gate_up.band", 1}});
  const Parameter& band = parameters.at(0);
  const c10::NoGradGuard no_grad;
  Tensor(band.leaves[0]).fill_(1e-3);
  int64_t before = 0;
  for (int64_t epoch = 0; epoch < 5; ++epoch) {
    band.begin_epoch(epoch, 5);
    band.write(state);
    const int64_t nonzero = state.transforms.at(Site::kGateUp)[0].left.ne(0).sum().item<int64_t>();
    EXPECT_GT(nonzero, before) << epoch;
    before = nonzero;
  }
  EXPECT_EQ(before, shape.hidden_size * shape.hidden_size);
}

TEST_P(TransformLeaves, ABandNeedsADominantStart) {
  BlockState state;
  state.transforms[Site::kValue] = {hadamard_factor(shape.head_dim, shape.num_kv_heads)};
  const int64_t dim = shape.head_dim;
  state.transforms[Site::kValue] = {matrix_factor(at::ones({dim, dim}, at::kDouble) + 0.1 * at::eye(dim, at::kDouble))};
  test::expect_error([&] { make(state, {{"value.band", 1}}); }, {"value", "diagonally dominant"});
}

TEST_P(TransformLeaves, TwoCannotMoveTheSameFactor) {
  test::expect_error(
      [&] {
        make(rich_state(), {{"*.matrix", 1}, {"value.svd", 1}});
      },
      {"\"matrix\"", "\"svd\"", "value"});
}

INSTANTIATE_TEST_SUITE_P(Shapes, TransformLeaves, testing::ValuesIn(test::tiny_shapes()), test::shape_name);

}  // namespace
}  // namespace baseq
