#include "pipeline/block_walk.h"

#include <ATen/ATen.h>

#include "block_test.h"
#include "pipeline/activation_ranges.h"

namespace baseq {
namespace {

class WalkedBlock : public test::BlockTest {
 protected:
  WalkedBlock() { grids = test::grids_of_bits(4, shape); }
};

TEST_P(WalkedBlock, SeesWhatAPassFromTheInputOfTheBlockSees) {
  for (const int64_t tokens_per_batch : {int64_t{2048}, 2 * kSeq}) {
    inputs.pass.tokens_per_batch = tokens_per_batch;
    for (const double residual_multiplier : {1.0, 0.5}) {
      layer.residual_multiplier = residual_multiplier;
      const BlockTask given = task();
      BlockWalk walk(given);
      for (const Site site : test::kInputSites) {
        std::vector<Tensor> seen;
        int64_t next = 0;
        walk.visit(site, layer, [&](int64_t begin, const Tensor& part) {
          EXPECT_EQ(begin, next);
          next += part.size(0);
          seen.push_back(part);
        });
        std::vector<Tensor> expected;
        for_each_batch(
            inputs.quantized, inputs.compute(),
            [&](int64_t, const Tensor& windows) { expected.push_back(layer.input_of(site, windows, inputs.rope)); },
            inputs.pass);
        // At down_proj in other batches, whose products may be summed in another order.
        const Tensor all = at::cat(seen), whole = at::cat(expected);
        EXPECT_TRUE(site == Site::kDown ? at::allclose(all, whole, 1e-5, 1e-6) : at::equal(all, whole))
            << site_info(site).name;
      }
      Tensor output = at::empty_like(x), whole = at::empty_like(x);
      advance_mlp(layer, walk.after_attention(), output, inputs.rope, inputs.pass);
      advance(layer, inputs.quantized, whole, inputs.rope, inputs.pass);
      EXPECT_TRUE(at::equal(output, whole));
    }
  }
}

TEST_P(WalkedBlock, RoundingKeepsWhatPassedUntilTheBlockChanges) {
  OpenBlock block = open_block();
  run(block, {RoundStep{.method = RoundStep::Method::kGptq}});
  OpenBlock::Passed passed = block.take_passed();
  ASSERT_TRUE(passed.after_attention.defined());
  EXPECT_EQ(passed.ranges.size(), 6U);
  EXPECT_FALSE(block.take_passed().after_attention.defined());
  Tensor output = at::empty_like(x);
  advance_mlp(block.layer(), passed.after_attention, output, inputs.rope, inputs.pass);
  EXPECT_TRUE(at::equal(output, block.layer().forward(x, inputs.rope)));
  const auto ranges = activation_ranges(block.layer(), x, inputs.rope);
  for (const auto& [name, range] : ranges) {
    EXPECT_EQ(passed.ranges.at(name).max, range.max) << name;
    EXPECT_EQ(passed.ranges.at(name).peak, range.peak) << name;
  }

  run(block, {RoundStep{.method = RoundStep::Method::kGptq}});
  block.edit([](BlockState&) {});
  EXPECT_FALSE(block.take_passed().after_attention.defined());
  // With points the block computes something else than what was seen.
  run(block, {PointsStep{.at = test::kInputSites}, RoundStep{.method = RoundStep::Method::kGptq}});
  EXPECT_FALSE(block.take_passed().after_attention.defined());
}

INSTANTIATE_TEST_SUITE_P(Shapes, WalkedBlock, testing::ValuesIn(test::tiny_shapes()), test::shape_name);

}  // namespace
}  // namespace baseq
