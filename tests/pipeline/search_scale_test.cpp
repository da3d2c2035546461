#include "pipeline/search_scale.h"

#include <gtest/gtest.h>

#include "baseq/quant/gptq.h"
#include "block_test.h"

namespace baseq {
namespace {

const std::vector<Site> kSearched = {Site::kQkv, Site::kValue, Site::kGateUp, Site::kDown};

class SearchScale : public test::BlockTest {
 protected:
  SearchScale() : BlockTest(at::kDouble) {
    grids = {.weights = QuantSpec{.num_bits = 3}};
    // Channels of different sizes, of which some matter more than others.
    const Tensor spread = test::random_normal({shape.hidden_size}, 31).exp();
    layer.input_layernorm.weight = layer.input_layernorm.weight * spread;
    layer.post_attention_layernorm.weight = layer.post_attention_layernorm.weight * spread.flip(0);
    target = layer.forward(x, inputs.rope);
  }

  /// The squared error of a branch whose readers at `site` are rounded, as a sum.
  double loss_of_readers(Site site, const DecoderLayer& of) const {
    DecoderLayer rounded = of, exact = layer;
    for (const std::string_view reader : site_info(site).readers) {
      rounded.linear(reader).weight =
          round_to_nearest(of.linear(reader).weight, *grids.weights).dequantized().to(dtype);
    }
    if (site_info(site).attention) {  // nothing of the MLP
      for (DecoderLayer* each : {&rounded, &exact})
        each->mlp.down_proj.weight = at::zeros_like(layer.mlp.down_proj.weight);
    }
    return (rounded.forward(x, inputs.rope) - exact.forward(x, inputs.rope)).square().sum().item<double>();
  }
};

TEST_P(SearchScale, TakesNoRatioThatIsWorseThanNone) {
  for (const Site site : kSearched) {
    SCOPED_TRACE(std::string(site_info(site).name));
    OpenBlock block = open_block();
    const SearchedScale found = search_scale(block, site, task());
    EXPECT_LE(found.loss, found.loss_before);
    EXPECT_GE(found.ratio, 0);
    EXPECT_LT(found.ratio, 1);
    EXPECT_NEAR(found.loss_before / loss_of_readers(site, layer), 1, 1e-4);
    block.edit([&](BlockState& state) { state.transforms[site].push_back(found.factor); });
    EXPECT_NEAR(found.loss / loss_of_readers(site, block.layer()), 1, 1e-4);
    EXPECT_NEAR((found.factor.left.max() * found.factor.left.min()).item<double>(), 1, 1e-9);
  }
}

TEST_P(SearchScale, ChannelsThatMatterGetAFinerGrid) {
  // One input is a hundred times the others: what its weights lose counts 10^4 times.
  layer.post_attention_layernorm.weight = at::ones({shape.hidden_size}, at::kDouble);
  layer.post_attention_layernorm.weight[5] = 100;
  target = layer.forward(x, inputs.rope);
  OpenBlock block = open_block();
  const SearchedScale found = search_scale(block, Site::kGateUp, task());
  EXPECT_GT(found.ratio, 0);
  EXPECT_LT(found.loss, found.loss_before);
  EXPECT_EQ(found.factor.left.argmin().item<int64_t>(), 5);
}

TEST_P(SearchScale, TheStepKeepsTheOutputOfTheBlock) {
  OpenBlock block = open_block();
  run(block, {TransformStep{.kind = TransformStep::Kind::kSearch, .at = kSearched}});
  EXPECT_LT(test::relative_error(block.layer().forward(x, inputs.rope), target), 1e-10);
  for (const Site site : kSearched) EXPECT_EQ(block.state().transforms.at(site).size(), 1U);
}

TEST_P(SearchScale, NeedsAWeightGrid) {
  grids.weights.reset();
  OpenBlock block = open_block();
  test::expect_error([&] { search_scale(block, Site::kQkv, task()); }, {"search_scale", "weight grid"});
}

INSTANTIATE_TEST_SUITE_P(Shapes, SearchScale, testing::ValuesIn(test::tiny_shapes()), test::shape_name);

}  // namespace
}  // namespace baseq
