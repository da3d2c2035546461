#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include "baseq/model/decoder.h"
#include "quantized_block.h"

namespace baseq {
namespace {

using test::expect_error;
using test::TempDirectory;
using test::TinyShape;

/// What a checkpoint quantizes.
struct Scheme {
  const char* name;
  QuantSpec weights;
  int64_t input_bits = 0, cache_bits = 0;  ///< 0: not quantized
  bool symmetric = false;                  ///< activations
  int64_t lora_rank = 0;
  at::ScalarType lora_dtype = at::kBFloat16;

  QuantizationConfig quantization(const TinyShape& shape) const {
    QuantizationConfig result{.weights = weights, .lora_rank = lora_rank};
    if (input_bits > 0) result.input_activations = test::token_grid(input_bits, symmetric);
    if (cache_bits > 0) result.kv_cache = test::cache_grid(shape, cache_bits, symmetric);
    return result;
  }
};

void PrintTo(const Scheme& scheme, std::ostream* stream) { *stream << scheme.name; }

/// A tiny quantized checkpoint and its model.
struct Quantized {
  TempDirectory directory;
  TinyShape shape;
  DecoderLayer layer;
  Model model;

  Quantized(const TinyShape& tiny, const Scheme& scheme)
      : shape(tiny),
        layer(test::quantized_block(shape, scheme.quantization(shape), scheme.lora_dtype)),
        model(written(scheme)) {}
  Model written(const Scheme& scheme) const {
    test::write_quantized(directory / "model", shape, scheme.quantization(shape), layer);
    return Model(Checkpoint(directory / "model"));
  }
};

std::vector<TinyShape> shapes_for(const Scheme& scheme) {
  std::vector<TinyShape> shapes = test::tiny_shapes();
  std::erase_if(shapes, [&](const TinyShape& shape) {
    const int64_t size = scheme.weights.strategy == Strategy::kGroup ? scheme.weights.group_size : 1;
    return shape.hidden_size % size != 0 || shape.intermediate_size % size != 0 ||
           shape.num_heads * shape.head_dim % size != 0;
  });
  return shapes;
}

class PreparedLayer : public testing::TestWithParam<Scheme> {};

TEST_P(PreparedLayer, EachLinearComputesWhatTheSimulatedOneComputes) {
  const c10::NoGradGuard no_grad;
  const Scheme& scheme = GetParam();
  const std::vector<TinyShape> shapes = shapes_for(scheme);
  ASSERT_FALSE(shapes.empty());
  for (const TinyShape& shape : shapes) {
    SCOPED_TRACE(shape.name);
    const Quantized quantized(shape, scheme);
    const DecoderLayer simulated = quantized.model.layer(0), prepared = quantized.model.layer(0, LoadOptions{});
    uint64_t seed = 3;
    simulated.for_each_linear([&](const std::string& name, const Linear& linear) {
      const Linear& integers = prepared.linear(name);
      ASSERT_TRUE(integers.prepared) << name;
      EXPECT_FALSE(integers.weight.defined() || integers.quantized) << name;
      const QuantPoint& point = simulated.point(input_site(name));
      const Tensor x = test::random_normal({2, 5, linear.weight.size(1)}, seed++, at::kFloat);
      Tensor expected = at::linear(point.forward(x).to(at::kDouble), linear.weight.to(at::kDouble));
      if (linear.bias.defined()) expected += linear.bias;
      const Tensor got = integers.forward(LinearInput(x, point));
      EXPECT_EQ(got.sizes(), expected.sizes());
      EXPECT_LT(test::relative_error(got, expected), scheme.input_bits > 0 ? 1e-6 : 1e-4) << name;
    });
  }
}

/// Logits of a Decoder, and how they can be asked for.
struct Bits {
  const Quantized& quantized;
  Decoder decoder = quantized.model.load();
  Tensor ids = test::random_ids({21}, quantized.shape.vocab_size, 9).to(at::kInt);

  std::span<const int32_t> tokens(size_t begin, size_t count) const {
    return {ids.const_data_ptr<int32_t>() + begin, count};
  }
  Tensor in_chunks(size_t chunk) const {
    KvCache cache = decoder.new_cache(21);
    std::vector<Tensor> rows;
    for (size_t begin = 0; begin < 21; begin += chunk) {
      rows.push_back(decoder.forward(tokens(begin, std::min<size_t>(chunk, 21 - begin)), cache, true));
    }
    return at::cat(rows);
  }
  /// The sequence as the second of three.
  Tensor in_a_batch() const {
    const Tensor other = test::random_ids({11}, quantized.shape.vocab_size, 10).to(at::kInt);
    const std::span<const int32_t> beside(other.const_data_ptr<int32_t>(), 11);
    std::vector<KvCache> caches;
    for (int i = 0; i < 3; ++i) caches.push_back(decoder.new_cache(21));
    KvCache* const pointers[] = {&caches[0], &caches[1], &caches[2]};
    const std::span<const int32_t> first[] = {beside, tokens(0, 13), beside.first(2)};
    const std::span<const int32_t> second[] = {beside.first(1), tokens(13, 8), beside.first(3)};
    const Tensor a = decoder.forward(first, pointers, true).narrow(0, 11, 13);
    return at::cat({a, decoder.forward(second, pointers, true).narrow(0, 1, 8)});
  }
};

TEST_P(PreparedLayer, LogitsAreTheSameBitsForThreadsChunksAndBatches) {
  for (const TinyShape& shape : shapes_for(GetParam())) {
    SCOPED_TRACE(shape.name);
    const Quantized quantized(shape, GetParam());
    const Bits bits{quantized};
    const Tensor expected = bits.decoder.logits(bits.ids);
    EXPECT_TRUE(expected.isfinite().all().item<bool>());
    const int threads = at::get_num_threads();
    for (const int count : {1, 2}) {
      at::set_num_threads(count);
      EXPECT_TRUE(at::equal(quantized.model.load().logits(bits.ids), expected)) << count << " threads";
      for (const size_t chunk : {1, 7, 21}) {
        EXPECT_TRUE(at::equal(bits.in_chunks(chunk), expected)) << "chunks of " << chunk << ", " << count << " threads";
      }
      EXPECT_TRUE(at::equal(bits.in_a_batch(), expected)) << count << " threads";
    }
    at::set_num_threads(threads);
    // Eight bits of weights and inputs leave little of the simulation out; four are chaotic.
    if (GetParam().weights.num_bits == 8 || GetParam().input_bits == 0) {
      const Tensor simulated = quantized.model.load(Model::kFloats).logits(bits.ids);
      EXPECT_LT(test::relative_error(expected, simulated), GetParam().input_bits == 0 ? 1e-3 : 0.1);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Schemes, PreparedLayer,
    testing::Values(
        Scheme{"W4A4KV4", {.num_bits = 4}, 4, 4}, Scheme{"W4A4KV4Symmetric", {.num_bits = 4}, 4, 4, true},
        Scheme{"W8A8KV8", {.num_bits = 8}, 8, 8}, Scheme{"W8A8", {.num_bits = 8}, 8, 0, true},
        Scheme{"W4A16Groups", {.num_bits = 4, .symmetric = false, .strategy = Strategy::kGroup, .group_size = 8}},
        Scheme{"W3A16LowRank", {.num_bits = 3, .strategy = Strategy::kGroup, .group_size = 8}, 0, 0, false, 3},
        Scheme{"W2A16LowRank8Bits",
               {.num_bits = 2, .symmetric = false, .strategy = Strategy::kGroup, .group_size = 8},
               0,
               0,
               false,
               3,
               at::kChar},
        Scheme{"W5A8KV4Bfloat16", {.num_bits = 5, .symmetric = false, .scale_dtype = at::kBFloat16}, 8, 4}),
    [](const auto& scheme) { return std::string(scheme.param.name); });

const Scheme kFourBits{"W4A4KV4", {.num_bits = 4}, 4, 4};

TEST(PreparedModel, RefusesGradients) {
  const Quantized quantized({}, kFourBits);
  const DecoderLayer layer = quantized.model.layer(0, LoadOptions{});
  const Tensor x = at::zeros({1, 3, 32});
  expect_error([&] { layer.forward(x, test::tiny_rope({}, 3, at::kFloat)); }, {"no gradients"});
}

TEST(PreparedModel, EightBitsOfUnquantizedInputsAreCoarserThanFifteen) {
  const Quantized quantized({}, {"W4A16", {.num_bits = 4}});
  const Tensor ids = test::random_ids({9}, 40, 1);
  const Tensor simulated = quantized.model.load(Model::kFloats).logits(ids);
  const double fifteen = test::relative_error(quantized.model.load().logits(ids), simulated);
  const double eight = test::relative_error(quantized.model.load({.activation_bits = 8}).logits(ids), simulated);
  EXPECT_LT(fifteen, 1e-3);
  EXPECT_GT(eight, 10 * fifteen);
  EXPECT_LT(eight, 0.1);
  expect_error([&] { quantized.model.load({.activation_bits = 7}); }, {"is 7", "8 or 15"});
}

TEST(PreparedModel, OtherDtypesAndFullPrecisionStayFloats) {
  const Quantized quantized({}, kFourBits);
  const Model exact(Checkpoint(quantized.directory / "model"), {.dtype = at::kDouble});
  EXPECT_FALSE(exact.runs_integers({}));
  EXPECT_TRUE(exact.layer(0, LoadOptions{}).mlp.up_proj.weight.defined());
  EXPECT_TRUE(quantized.model.runs_integers({}));
  EXPECT_FALSE(quantized.model.runs_integers(Model::kFloats));
  const TempDirectory directory;
  test::write_checkpoint(directory / "model", TinyShape{});
  EXPECT_FALSE(Model(Checkpoint(directory / "model")).runs_integers({}));
}

TEST(PreparedModel, ADecoderHoldsItsWeightsPacked) {
  const TinyShape shape{.hidden_size = 128, .intermediate_size = 256, .num_heads = 4, .head_dim = 32};
  const Quantized quantized(shape, {"W4A16", {.num_bits = 4}});
  const Decoder decoder = quantized.model.load();
  EXPECT_LT(decoder.bytes(), int64_t(1.05 * double(quantized.model.checkpoint().num_bytes())));
}

}  // namespace
}  // namespace baseq
