#include "baseq/model/site.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <set>

#include "../tiny_model.h"
#include "baseq/model/model.h"

namespace baseq {
namespace {

using test::TinyShape;

class Sites : public testing::TestWithParam<TinyShape> {
 protected:
  TinyShape shape = GetParam();
  ModelConfig config = test::tiny_model_config(shape);
  DecoderLayer layer = test::tiny_layer(shape, 1);
  RotaryEmbedding rope = test::tiny_rope(shape, 11);
  Tensor x = test::random_normal({2, 11, shape.hidden_size}, 7);
  int64_t kv = shape.num_kv_heads, dim = shape.head_dim, group = shape.num_heads / shape.num_kv_heads;

  /// Rows of a linear, of `repeat` copies of every head, turn as y T or y T^-T.
  static void turn_rows(Linear& linear, const Tensor& matrix, int64_t heads, int64_t repeat) {
    const int64_t width = matrix.size(0) / heads;
    const Tensor blocks = matrix.reshape({heads, width, heads, width}).diagonal(0, 0, 2).permute({2, 0, 1});
    const Tensor all = blocks.repeat_interleave(repeat, 0);
    const Tensor rows = linear.weight.view({heads * repeat, width, -1});
    linear.weight = at::matmul(all.mT(), rows).reshape(linear.weight.sizes());
    if (!linear.bias.defined()) return;
    linear.bias = at::matmul(linear.bias.view({heads * repeat, 1, width}), all).flatten();
  }

  /// The block with T [n, n] in the weights around a site, as absorbed() says that they take it.
  DecoderLayer with(Site site, const Factor& factor) {
    const Tensor t = apply_transform({factor}, at::eye(factor.size(), at::kDouble));
    const Tensor inverse = apply_inverse_transpose({factor}, at::eye(factor.size(), at::kDouble));
    const Tensor sizes = t.diagonal();
    DecoderLayer turned = layer;
    switch (site) {
      case Site::kQkv:
      case Site::kGateUp:
        turned.norm(site).weight = turned.norm(site).weight * sizes;
        break;
      case Site::kQueryKey:
        if (config.qk_norm && same_in_every_head(factor)) {
          turned.self_attn.k_norm.weight = turned.self_attn.k_norm.weight * sizes.narrow(0, 0, dim);
          turned.self_attn.q_norm.weight = turned.self_attn.q_norm.weight / sizes.narrow(0, 0, dim);
          return turned;
        }
        turn_rows(turned.self_attn.k_proj, t, kv, 1);
        turn_rows(turned.self_attn.q_proj, inverse, kv, group);
        if (config.qk_norm && factor.kind == Factor::Kind::kPermutation) {
          for (RmsNorm* norm : {&turned.self_attn.k_norm, &turned.self_attn.q_norm}) {
            norm->weight = norm->weight.index_select(0, factor.left.narrow(0, 0, dim));
          }
        }
        return turned;
      case Site::kValue: {
        turn_rows(turned.self_attn.v_proj, t, kv, 1);
        Tensor& o = turned.self_attn.o_proj.weight;
        const Tensor heads = o.view({o.size(0), kv, group, dim}).transpose(1, 2).flatten(2);  // [hidden, group, kv dim]
        o = at::matmul(heads, inverse).view({o.size(0), group, kv, dim}).transpose(1, 2).reshape(o.sizes());
        return turned;
      }
      default:  // kDown
        turn_rows(turned.mlp.up_proj, t, 1, 1);
        if (factor.kind == Factor::Kind::kPermutation) turn_rows(turned.mlp.gate_proj, t, 1, 1);
    }
    for (const std::string_view name : site_info(site).readers) {
      turned.linear(name).weight = apply_inverse_transpose({factor}, turned.linear(name).weight);
    }
    return turned;
  }

  /// The decision for block 0, which must be what the block computes.
  bool decide(Site site, const Factor& factor) {
    const bool taken = absorbed(site, factor, config, 0);
    const double error = test::relative_error(with(site, factor).forward(x, rope), layer.forward(x, rope));
    EXPECT_EQ(error < 1e-10, taken) << site_info(site).name << ", factor " << int(factor.kind) << ": " << error;
    return taken;
  }

  bool same_in_every_head(const Factor& factor) const {
    if (factor.kind != Factor::Kind::kScale) return false;
    const Tensor heads = factor.left.view({kv, dim});
    return at::equal(heads, heads.narrow(0, 0, 1).expand_as(heads));
  }

  static Tensor invertible(at::IntArrayRef sizes) { return test::invertible(sizes, 3); }
  /// Permutes the features of every head, of each in its own way or of all in the same.
  Factor head_permutation(bool same) const {
    std::vector<Tensor> rows;
    const auto turned = [&](int64_t by) { return at::arange(dim, at::kLong).roll({by}); };
    for (int64_t h = 0; h < kv; ++h) rows.push_back(turned(same ? 1 : 1 + h % (dim - 1)) + h * dim);
    return permutation_factor(at::cat(rows));
  }
};

TEST_P(Sites, NameWhatALayerHas) {
  std::set<std::string> points;
  for (const SiteInfo& info : sites()) {
    EXPECT_EQ(site_info(info.site).name, info.name);
    const SiteShape size = site_shape(info.site, config);
    for (const std::string_view reader : info.readers) {
      if (info.site == Site::kValue) continue;  // o_proj reads the values of a group's head several times
      EXPECT_EQ(layer.linear(reader).weight.size(1), size.features) << reader;
      EXPECT_TRUE(!info.is_input() || input_site(reader) == info.site) << reader;
      EXPECT_TRUE(!info.is_input() || info.attention == reader.starts_with("self_attn.")) << reader;
    }
    for (const std::string_view special : {info.permuted, info.opposite}) {
      EXPECT_TRUE(special.empty() || std::ranges::count(info.writers, special) == 1) << info.name;
    }
    for (const std::string_view writer : info.writers) {
      if (writer == info.opposite) continue;  // as wide as the query heads
      EXPECT_EQ(layer.linear(writer).weight.size(0), size.features) << writer;
    }
    EXPECT_TRUE(info.norm.empty() || layer.norm(info.site).weight.size(0) == size.features);
    EXPECT_TRUE(info.fused.empty() || input_site(info.fused) == info.site);
    EXPECT_TRUE(!info.online || layer.transform(info.site).empty());
    EXPECT_EQ(size.width(), info.cache ? dim : size.features);
    EXPECT_EQ(info.label.empty(), info.point.empty());
    if (info.point.empty()) continue;
    points.emplace(info.point);
    EXPECT_EQ(layer.shape(info.site).features, size.features);
    EXPECT_EQ(layer.shape(info.site).blocks, size.blocks);
  }
  layer.for_each_linear([](const std::string& name, const Linear&) {
    EXPECT_EQ(writes_cache(name), name == "self_attn.k_proj" || name == "self_attn.v_proj") << name;
  });
  layer.for_each_quant_point([&](const std::string& name, QuantPoint&) { EXPECT_EQ(points.erase(name), 1) << name; });
  EXPECT_TRUE(points.empty());
  EXPECT_THROW(layer.linear("mlp.qkv_proj"), c10::Error);
  EXPECT_THROW(layer.point(Site::kResidual), c10::Error);
  EXPECT_THROW(layer.norm(Site::kO), c10::Error);
  EXPECT_THROW(layer.norm("norm"), c10::Error);
  EXPECT_THROW(layer.transform(Site::kValue), c10::Error);
  EXPECT_THROW(layer.input_of(Site::kValue, x, rope), c10::Error);
  EXPECT_THROW(input_site("lm_head"), c10::Error);
}

TEST_P(Sites, AfterANormOnlyScalesAreAbsorbed) {
  const int64_t n = shape.hidden_size;
  for (const Site site : {Site::kQkv, Site::kGateUp}) {
    EXPECT_TRUE(decide(site, scale_factor(test::random_normal({n}, 2).exp())));
    EXPECT_FALSE(decide(site, hadamard_factor(n)));
    EXPECT_FALSE(decide(site, matrix_factor(invertible({n, n}))));
    EXPECT_FALSE(decide(site, permutation_factor(at::arange(n, at::kLong).roll({1}))));
  }
  EXPECT_TRUE(absorbed(Site::kResidual, hadamard_factor(n), config, 0));
  EXPECT_TRUE(absorbed(Site::kResidual, rotation_factor(cayley(invertible({n, n}))), config, 0));
  EXPECT_FALSE(absorbed(Site::kResidual, scale_factor(at::full({n}, 2.0)), config, 0));
  EXPECT_THROW(absorbed(Site::kQkv, hadamard_factor(n + 4), config, 0), c10::Error);
}

TEST_P(Sites, DownAbsorbsScalesAndPermutations) {
  const int64_t n = shape.intermediate_size;
  EXPECT_TRUE(decide(Site::kDown, scale_factor(test::random_normal({n}, 2))));
  EXPECT_TRUE(decide(Site::kDown, permutation_factor(at::arange(n, at::kLong).roll({3}))));
  EXPECT_FALSE(absorbed(Site::kDown, hadamard_factor(n), config, 0));
  EXPECT_FALSE(absorbed(Site::kDown, kronecker_factor(invertible({2, 2}), invertible({n / 2, n / 2})), config, 0));
  EXPECT_FALSE(absorbed(Site::kO, scale_factor(at::full({shape.num_heads * dim}, 2.0)), config, 0));
}

TEST_P(Sites, ValuesAbsorbWhatStaysWithinHeads) {
  const int64_t n = kv * dim;
  EXPECT_TRUE(decide(Site::kValue, scale_factor(test::random_normal({n}, 2))));
  EXPECT_TRUE(decide(Site::kValue, hadamard_factor(dim, kv)));
  EXPECT_TRUE(decide(Site::kValue, hadamard_factor(dim / 2, 2 * kv)));
  EXPECT_TRUE(decide(Site::kValue, matrix_factor(invertible({kv, dim, dim}))));
  EXPECT_TRUE(decide(Site::kValue, matrix_factor(invertible({2 * kv, dim / 2, dim / 2}))));
  EXPECT_TRUE(decide(Site::kValue, head_permutation(false)));
  const bool one_head = kv == 1;
  EXPECT_EQ(decide(Site::kValue, matrix_factor(invertible({n, n}))), one_head);
  EXPECT_EQ(decide(Site::kValue, kronecker_factor(invertible({2, 2}), invertible({n / 2, n / 2}))), one_head);
  EXPECT_EQ(decide(Site::kValue, permutation_factor(at::arange(n, at::kLong).roll({1}))), one_head);
}

TEST_P(Sites, QueriesAndKeysAbsorbWhatCommutesWithRopeAndNorms) {
  for (const bool turns : {config.blocks[0].rope, false}) {
    SCOPED_TRACE(turns ? "with RoPE" : "without RoPE");
    config.blocks[0].rope = layer.self_attn.use_rope = turns;
    const bool norms = config.qk_norm, one_head = kv == 1;
    const int64_t half = turns ? rotary_dim(config.rope, dim) / 2 : dim / 2, rest = dim - 2 * half;
    const auto scale = [&](bool pairs, bool same) {
      const auto part = [&](int64_t width, uint64_t seed) {
        return test::random_normal({same ? 1 : kv, width}, seed).exp();
      };
      const Tensor first = part(half, 2), second = pairs ? first : part(half, 3);
      return scale_factor(at::cat({first, second, part(rest, 4)}, 1).expand({kv, dim}).flatten().contiguous());
    };
    EXPECT_TRUE(decide(Site::kQueryKey, scale(/*pairs=*/true, /*same=*/true)));
    EXPECT_EQ(decide(Site::kQueryKey, scale(/*pairs=*/true, /*same=*/false)), !norms || one_head);
    EXPECT_EQ(decide(Site::kQueryKey, scale(/*pairs=*/false, /*same=*/true)), !turns);
    EXPECT_EQ(decide(Site::kQueryKey, head_permutation(/*same=*/true)), !turns);
    EXPECT_EQ(decide(Site::kQueryKey, head_permutation(/*same=*/false)), !turns && (!norms || one_head));
    EXPECT_EQ(decide(Site::kQueryKey, hadamard_factor(dim, kv)), !turns && !norms);
    EXPECT_EQ(decide(Site::kQueryKey, matrix_factor(invertible({kv, dim, dim}))), !turns && !norms);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, Sites, testing::ValuesIn(test::tiny_shapes()), test::shape_name);

TEST(SiteTable, EveryFamilyDecidesAlike) {
  for (const auto& entry : std::filesystem::directory_iterator(BASEQ_TEST_DATA)) {
    if (!std::filesystem::exists(entry.path() / "config.json")) continue;
    SCOPED_TRACE(entry.path().filename().string());
    const auto stored = nlohmann::json::parse(std::ifstream(entry.path() / "config.json"));
    const ModelConfig config = ModelConfig::from_json(stored, "config.json");
    const int64_t kv = config.num_key_value_heads, dim = config.head_dim;
    for (const SiteInfo& info : sites()) {
      const int64_t n = site_shape(info.site, config).features;
      for (int64_t block = 0; block < config.num_hidden_layers; ++block) {
        const bool scale = absorbed(info.site, scale_factor(at::full({n}, 2.0)), config, block);
        EXPECT_EQ(scale, info.site != Site::kResidual && info.site != Site::kO) << info.name;
        const bool free = info.site == Site::kQueryKey && !config.blocks[size_t(block)].rope && !config.qk_norm;
        const bool per_head = info.cache && absorbed(info.site, hadamard_factor(dim, kv), config, block);
        EXPECT_EQ(per_head, info.site == Site::kValue || free) << info.name;
      }
    }
  }
}

}  // namespace
}  // namespace baseq
