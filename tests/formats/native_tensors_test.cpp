#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "../tiny_model.h"
#include "baseq/model/model.h"
#include "formats/native/config.h"
#include "model/unused_tensors.h"

namespace baseq {
namespace {

using test::expect_error;
using test::TempDirectory;
using test::TinyShape;

using Tensors = std::map<std::string, Tensor>;

constexpr const char* kDown = "model.layers.0.mlp.down_proj.input_quant.transform.";
constexpr const char* kKeys = "model.layers.0.self_attn.k_cache_quant.transform.";

Tensor invertible(at::IntArrayRef sizes, uint64_t seed) { return test::invertible(sizes, seed).to(at::kFloat); }

/// A factor of every kind for n features, float32.
Transform factors_of(int64_t n, uint64_t seed) {
  return {scale_factor(test::random_normal({n}, seed, at::kFloat).exp()),
          hadamard_factor(n),
          hadamard_factor(n / 2, 2),
          matrix_factor(invertible({2, n / 2, n / 2}, seed + 1)),
          rotation_factor(cayley(invertible({n, n}, seed + 2))),
          kronecker_factor(invertible({2, 2}, seed + 3), invertible({n / 2, n / 2}, seed + 4)),
          left_kronecker_factor(invertible({2, 2}, seed + 5), n / 2),
          permutation_factor(at::randperm(n, test::generator(seed), at::TensorOptions(at::kLong)))};
}

/// The shape's model with blocks that are all `layer`, as version 5.
Tensors tensors_of(const TinyShape& shape, const DecoderLayer& layer) {
  Tensors tensors = test::tiny_tensors(shape, 1);
  std::erase_if(tensors, [](const auto& item) { return item.first.starts_with("model.layers."); });
  for (int64_t i = 0; i < shape.num_layers; ++i) tensors.merge(layer_tensors(layer, layer_prefix(i), at::kFloat));
  return tensors;
}

Checkpoint write(const std::filesystem::path& directory, const TinyShape& shape, const Tensors& tensors) {
  nlohmann::json config = test::tiny_config(shape);
  config["quantization_config"] = to_json(QuantizationConfig{});
  test::write_checkpoint(directory, config, tensors);
  return Checkpoint(directory);
}

class StoredTransforms : public testing::TestWithParam<TinyShape> {
 protected:
  /// A layer with `transform` at a site comes back from a checkpoint and computes the same.
  void expect_stored(Site site, const Transform& transform) {
    layer = test::tiny_layer(shape, 3, at::kFloat);
    layer.transform(site) = transform;
    const Tensors tensors = tensors_of(shape, layer);
    const TempDirectory directory;
    const Checkpoint checkpoint = write(directory.path(), shape, tensors);
    const Model model(checkpoint, {.dtype = at::kDouble});
    EXPECT_EQ(model.unused_names(), std::vector<std::string>{});
    std::vector<Factor::Kind> kinds;
    for (const Factor& factor : transform) kinds.push_back(factor.kind);
    EXPECT_EQ(model.online_kinds(0, site), kinds);
    const DecoderLayer loaded = model.layer(0), single = Model(checkpoint).layer(0);
    const Tensor x = test::random_normal({2, 7, shape.hidden_size}, 8);
    const Tensor expected = layer.to(at::kDouble).forward(x, test::tiny_rope(shape, 7));
    EXPECT_LT(test::relative_error(loaded.forward(x, test::tiny_rope(shape, 7)), expected), 1e-10);
    const Tensor y = x.to(at::kFloat);
    const RotaryEmbedding rope = test::tiny_rope(shape, 7, at::kFloat);
    EXPECT_TRUE(at::equal(single.forward(y, rope), layer.forward(y, rope)));
    // Saved again it is the same: nothing was rounded on the way.
    const Tensors again = layer_tensors(loaded, layer_prefix(1), at::kFloat);
    for (const auto& [name, tensor] : again) EXPECT_TRUE(at::equal(tensor, tensors.at(name))) << name;
    EXPECT_EQ(again.size(), layer_tensors(layer, "", at::kFloat).size());
  }

  TinyShape shape = GetParam();
  ModelConfig config = test::tiny_model_config(shape);
  DecoderLayer layer;
};

TEST_P(StoredTransforms, OfEveryKindAtEverySiteComeBack) {
  for (const SiteInfo& info : sites()) {
    if (!info.online) continue;
    const Transform factors = factors_of(site_shape(info.site, config).width(), 11);
    for (const Factor& factor : factors) {
      SCOPED_TRACE(std::string(info.name) + ", " + kind_name(factor.kind));
      expect_stored(info.site, {factor});
    }
    SCOPED_TRACE(std::string(info.name) + ", chain");
    expect_stored(info.site, factors);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, StoredTransforms, testing::ValuesIn(test::tiny_shapes()), test::shape_name);

TEST(StoredTransform, AHadamardTransformInBlocksIsStoredWithTheirOrder) {
  const TinyShape shape{.intermediate_size = 42};  // no matrix of order 42 is known, one of 2 is
  DecoderLayer layer = test::tiny_layer(shape, 3, at::kFloat);
  layer.transform(Site::kDown) = {hadamard_factor(42)};
  const Tensors tensors = tensors_of(shape, layer);
  EXPECT_TRUE(at::equal(tensors.at(std::string(kDown) + "0.hadamard"), at::tensor({2, 21}, at::kLong)));
  const TempDirectory directory;
  const Checkpoint checkpoint = write(directory.path(), shape, tensors);
  const Tensor x = test::random_normal({2, 7, shape.hidden_size}, 8, at::kFloat);
  const RotaryEmbedding rope = test::tiny_rope(shape, 7, at::kFloat);
  EXPECT_TRUE(at::equal(Model(checkpoint).layer(0).forward(x, rope), layer.forward(x, rope)));
}

TEST(StoredTransform, EveryBlockHasItsOwn) {
  const TinyShape shape;
  DecoderLayer layer = test::tiny_layer(shape, 3, at::kFloat);
  Tensors tensors = tensors_of(shape, layer);
  tensors["model.layers.1.self_attn.input_quant.transform.0.scale"] = at::full({32}, 2.0f);
  const TempDirectory directory;
  const Checkpoint checkpoint = write(directory.path(), shape, tensors);
  const Model model(checkpoint);
  EXPECT_TRUE(model.layer(0).transform(Site::kQkv).empty());
  EXPECT_EQ(model.layer(1).transform(Site::kQkv).size(), 1u);
  EXPECT_EQ(model.online_kinds(1, Site::kQkv), std::vector{Factor::Kind::kScale});
}

/// A change of a good checkpoint, a chain of scale and Hadamard at down and a matrix of keys, and what the refusal
/// says.
struct Wrong {
  const char* name;
  std::function<void(Tensors&)> change;
  std::vector<std::string> parts;
};

std::function<void(Tensors&)> with(const std::string& name, const Tensor& tensor) {
  return [=](Tensors& tensors) { tensors[name] = tensor; };
}

std::vector<Wrong> wrong_checkpoints() {
  const std::string down = kDown, keys = kKeys;
  const auto longs = [](std::initializer_list<int64_t> values) { return at::tensor(values, at::kLong); };
  const auto down_hadamard = [&](const Tensor& sizes) { return with(down + "1.hadamard", sizes); };
  const auto second = [&](const std::string& part, const Tensor& tensor) { return with(down + "2." + part, tensor); };
  std::vector<Wrong> wrong = {
      {"a scale of another size", with(down + "0.scale", at::ones({47})), {down + "0.scale", "47", "48"}},
      {"a scale in two dimensions", with(down + "0.scale", at::ones({1, 48})), {down + "0.scale", "[1, 48]"}},
      {"a scale of integers", with(down + "0.scale", at::ones({48}, at::kInt)), {down + "0.scale", "I32"}},
      {"a scale of nothing", with(down + "0.scale", at::ones({0})), {down + "0.scale", "[0]"}},
      {"a gap", with(down + "3.scale", at::ones({48})), {down + "3.scale", "no factor 2"}},
      {"no first factor", [=](Tensors& t) { t.erase(down + "0.scale"); }, {down + "1.hadamard", "no factor 0"}},
      {"another kind at a position", with(down + "1.scale", at::ones({48})), {down + "1.", "same position"}},
      {"an unknown kind", second("rotor", at::ones({48})), {down + "2.rotor", "kronecker_left", "permutation"}},
      {"half of a kronecker factor", second("kronecker_left", at::eye(6)), {down + "2.kronecker_right", "missing"}},
      {"an inverse that nothing needs",
       with(down + "0.scale_inverse", at::ones({48})),
       {down + "0.scale_inverse", "only self_attn.k_cache_quant"}},
      {"an inverse alone", with(keys + "1.matrix_inverse", at::ones({1, 8, 8})), {keys + "1.matrix is missing"}},
      {"an inverse of another size",
       with(keys + "0.matrix_inverse", at::ones({2, 8, 8})),
       {keys + "0.matrix_inverse", "[2, 8, 8]"}},
      {"a matrix of all heads", with(keys + "0.matrix", at::ones({2, 8, 8})), {keys + "0.matrix"}},
      {"a matrix that is not square", second("matrix", at::ones({2, 24, 23})), {down + "2.matrix", "[2, 24, 23]"}},
      {"a matrix without blocks", second("matrix", at::ones({48, 48})), {down + "2.matrix", "three dimensions"}},
      {"too many blocks", second("matrix", at::ones({3, 24, 24})), {down + "2.matrix", "72", "48"}},
      {"an index twice", second("permutation", at::zeros({48}, at::kLong)), {down + "2.permutation", "0 to 47"}},
      {"an index too large", second("permutation", at::arange(1, 49, at::kLong)), {down + "2.permutation", "0 to 47"}},
      {"indices that are no integers", second("permutation", at::arange(48, at::kFloat)), {down + "2.perm", "F32"}},
      {"a hadamard of int32", down_hadamard(at::tensor({48, 1}, at::kInt)), {down + "1.hadamard", "I32"}},
      {"a hadamard of three numbers", down_hadamard(longs({48, 1, 1})), {down + "1.hadamard", "[3]"}},
      {"a huge hadamard", down_hadamard(longs({int64_t{1} << 62, 4})), {down + "1.hadamard", "48 features"}},
      {"many hadamards", down_hadamard(longs({24, int64_t{1} << 62})), {down + "1.hadamard", "48 features"}},
      {"a hadamard of order 0", down_hadamard(longs({0, 48})), {down + "1.hadamard", "48 features"}},
      {"a negative hadamard", down_hadamard(longs({-48, -1})), {down + "1.hadamard", "48 features"}},
      {"a hadamard that is not known", down_hadamard(longs({3, 16})), {down + "1.hadamard", "order 3"}},
      {"a point without one",
       with("model.layers.1.self_attn.v_cache_quant.transform.0.scale", at::ones({16})),
       {"v_cache_quant.transform.0.scale", "no online transform", "mlp.input_quant"}},
      {"no point",
       with("model.layers.1.transform.0.scale", at::ones({16})),
       {"layers.1.transform.0.scale", "no online transform"}},
      {"a reserved head", with("lm_head.weight_packed", at::ones({40, 4}, at::kInt)), {"lm_head.weight_p", "reserved"}},
      {"a reserved embedding",
       with("model.embed_tokens.weight_scale", at::ones({40, 1})),
       {"embed_tokens.weight_scale", "reserved"}},
      {"reserved levels",
       with("model.layers.0.mlp.up_proj.weight_levels", at::ones({16})),
       {"mlp.up_proj.weight_levels", "reserved"}}};
  for (const char* position : {"x", "01", "-1", "+1", "", "1e3", "99999999999999999999"}) {
    wrong.push_back({"a position", with(down + position + ".scale", at::ones({48})), {"transform", "position"}});
  }
  return wrong;
}

TEST(StoredTransform, WhatIsWrongIsRefusedByName) {
  const TinyShape shape;
  DecoderLayer layer = test::tiny_layer(shape, 3, at::kFloat);
  layer.transform(Site::kDown) = {scale_factor(at::full({48}, 2.0f)), hadamard_factor(48)};
  layer.transform(Site::kQueryKey) = {matrix_factor(invertible({8, 8}, 5))};
  const Tensors good = tensors_of(shape, layer);
  const TempDirectory directory;
  const auto read = [&](const Tensors& tensors, const std::string& name) {
    const Checkpoint checkpoint = write(directory / name, shape, tensors);
    Model(checkpoint).layer(0);
  };
  EXPECT_NO_THROW(read(good, "good"));
  int number = 0;
  for (const Wrong& wrong : wrong_checkpoints()) {
    SCOPED_TRACE(wrong.name);
    Tensors tensors = good;
    wrong.change(tensors);
    expect_error([&] { read(tensors, std::to_string(number++)); }, wrong.parts);
  }
}

TEST(StoredTransform, OfABlockBeyondTheLastIsUnused) {
  const TinyShape shape;
  Tensors tensors = tensors_of(shape, test::tiny_layer(shape, 3, at::kFloat));
  tensors["model.layers.2.mlp.input_quant.transform.0.scale"] = at::ones({32});
  const TempDirectory directory;
  const Checkpoint checkpoint = write(directory.path(), shape, tensors);
  const std::vector<Unused> unused = find_unused(Model(checkpoint));
  ASSERT_EQ(unused.size(), 1u);
  EXPECT_NE(unused[0].message().find("num_hidden_layers 2"), std::string::npos);
}

TEST(Version4, ComputesTheLogitsThatItsProgramComputed) {
  // In float64: in float32 the order of sums would decide some codes of activations.
  const auto directory = test::golden_directory("version_4");
  const Checkpoint checkpoint(directory);
  const SafetensorsFile golden(directory / "golden.safetensors");
  const Model model(checkpoint, {.dtype = at::kDouble});
  EXPECT_EQ(model.quantization()->format_version, 4);
  for (const SiteInfo& info : sites()) {
    const std::vector<Factor::Kind> kinds = model.online_kinds(1, info.site);
    EXPECT_EQ(kinds, std::vector<Factor::Kind>(info.online ? 1 : 0, Factor::Kind::kHadamard)) << info.name;
  }
  const Tensor logits = model.logits(golden.tensor("input_ids"));
  EXPECT_LT(test::relative_error(logits, golden.tensor("logits")), 1e-6);
}

TEST(Version4, WrittenAgainAsVersion5ComputesTheSame) {
  const Checkpoint old(test::golden_directory("version_4"));
  const Model model(old);
  Tensors tensors;
  for (const std::string& name : old.names()) tensors[name] = old.tensor(name);
  for (const int64_t block : {0, 1}) {
    for (auto& [name, tensor] : layer_tensors(model.layer(block), layer_prefix(block), at::kFloat)) {
      if (name.find(".transform.") != name.npos) tensors[name] = tensor;
    }
  }
  EXPECT_EQ(tensors.size(), old.names().size() + 10);
  nlohmann::json config = old.config();
  config["quantization_config"] = to_json(*model.quantization());
  const TempDirectory directory;
  test::write_checkpoint(directory.path(), config, tensors);
  const Checkpoint renewed(directory.path());
  const Tensor ids = test::random_ids({2, 9}, 64, 3);
  EXPECT_TRUE(at::equal(Model(renewed).logits(ids), model.logits(ids)));
}

}  // namespace
}  // namespace baseq
