#include "baseq/quant/decode.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <array>
#include <functional>
#include <random>

#include "baseq/quant/pack.h"
#include "quant/decode_kernel.h"

namespace baseq {
namespace {

struct DecodeCase {
  int64_t out_features, in_features, rank;
  QuantSpec spec;
  bool bias = false;
  at::ScalarType lora_dtype = at::kBFloat16;
};

int64_t groups_of(const DecodeCase& c) {
  return c.spec.strategy == Strategy::kGroup ? c.in_features / c.spec.group_size : 1;
}

/// A random linear, and in float64 the weight that it stands for.
struct TestLinear {
  PackedLinear packed;
  Tensor weight;
};

TestLinear random_linear(const DecodeCase& c) {
  const int64_t bits = c.spec.num_bits, low = -(1 << (bits - 1)), high = 1 << (bits - 1), groups = groups_of(c);
  const int64_t rows = c.spec.strategy == Strategy::kTensor ? 1 : c.out_features;
  const Tensor codes = at::randint(low, high, {c.out_features, c.in_features}, at::kChar);
  const Tensor scale = (at::rand({rows, groups}) * 0.1 + 0.01).to(c.spec.scale_dtype);
  QuantizedWeight weight{.spec = c.spec, .codes = codes, .qparams = {scale.to(at::kFloat), {}}};
  if (!c.spec.symmetric) weight.qparams.zero_point = at::randint(low, high, {rows, groups}, at::kFloat);
  TestLinear result{{}, weight.dequantized().to(at::kDouble)};
  LowRankFactors lora;
  if (c.rank > 0) {
    lora = store_factors(at::randn({c.rank, c.in_features}), at::randn({c.out_features, c.rank}) * 0.1, c.lora_dtype);
    result.weight += at::mm(lora.dequantized_B().to(at::kDouble), lora.dequantized_A().to(at::kDouble));
  }
  result.packed = pack_linear(weight, lora, c.bias ? at::randn({c.out_features}) : Tensor());
  return result;
}

Tensor reference(const TestLinear& linear, const Tensor& x) {
  const Tensor y = at::mv(linear.weight, x.to(at::kDouble));
  return linear.packed.bias.defined() ? y + linear.packed.bias.to(at::kDouble) : y;
}

/// The largest error over the size of what was summed.
double relative_error(const Tensor& y, const TestLinear& linear, const Tensor& x) {
  const Tensor size = at::mv(linear.weight.abs(), x.to(at::kDouble).abs()).max();
  return ((y.to(at::kDouble) - reference(linear, x)).abs().max() / size).item<double>();
}

std::string name(const DecodeCase& c) {
  return c10::str(c.out_features, "x", c.in_features, " rank ", c.rank, ", ", c.spec.num_bits, " bits, group ",
                  c.spec.group_size, c.spec.symmetric ? ", symmetric" : ", asymmetric");
}

TEST(DecodeLinear, IsTheProductWithTheDequantizedWeightAndTheSubBranch) {
  at::manual_seed(1);
  for (int64_t bits = 2; bits <= 8; ++bits) {
    for (const bool symmetric : {true, false}) {
      for (const int64_t group_size : {0, 8, 24, 32, 64, 128, 256}) {
        for (const int64_t rank : {0, 16, 33}) {
          const DecodeCase c{37,
                             768,
                             rank,
                             {.num_bits = bits,
                              .symmetric = symmetric,
                              .strategy = group_size == 0 ? Strategy::kChannel : Strategy::kGroup,
                              .group_size = group_size},
                             rank == 16,
                             rank == 33 && symmetric ? at::kChar : at::kBFloat16};
          const TestLinear linear = random_linear(c);
          const Tensor x = at::randn({c.in_features});
          ASSERT_LT(relative_error(decode_linear(linear.packed, x), linear, x), 1e-6) << name(c);
        }
      }
    }
  }
}

TEST(DecodeLinear, TakesAnyShape) {
  at::manual_seed(2);
  std::mt19937 random(3);
  for (int i = 0; i < 300; ++i) {
    const int64_t bits = 2 + random() % 7, group_size = 8 * (random() % 9);
    const int64_t in = group_size == 0 ? 1 + random() % 700 : group_size * (1 + random() % 12);
    const DecodeCase c{static_cast<int64_t>(1 + random() % 70),
                       in,
                       static_cast<int64_t>(random() % 70),
                       {.num_bits = bits,
                        .symmetric = random() % 2 == 0,
                        .strategy = group_size > 0      ? Strategy::kGroup
                                    : random() % 2 == 0 ? Strategy::kChannel
                                                        : Strategy::kTensor,
                        .group_size = group_size,
                        .scale_dtype = std::array{at::kFloat, at::kBFloat16, at::kHalf}[random() % 3]},
                       random() % 2 == 0,
                       std::array{at::kBFloat16, at::kChar}[random() % 2]};
    const TestLinear linear = random_linear(c);
    const Tensor x = at::randn({in});
    ASSERT_LT(relative_error(decode_linear(linear.packed, x), linear, x), 2e-6) << name(c);
  }
}

TEST(DecodeLinear, EveryInstructionSetComputesTheSame) {
  at::manual_seed(4);
  const Tensor x = at::randn({203}), ordered = at::empty({203});
  for (int64_t i = 0; i < kNumDecodeKernels; ++i) {
    const DecodeKernels& kernels = kDecodeKernels[i];
    if (!kernels.supported()) continue;
    for (const auto type : {FactorType::kBFloat16, FactorType::kInt8}) {
      const Tensor a = type == FactorType::kInt8 ? at::randint(-128, 128, {7, 203}, at::kChar)
                                                 : at::randn({7, 203}).to(at::kBFloat16);
      const Tensor expected = at::mv(a.to(at::kDouble), x.to(at::kDouble)), y = at::zeros({7});
      factor_order(type, x.const_data_ptr<float>(), 203, kernels.lanes, ordered.mutable_data_ptr<float>());
      kernels.project(type, a.const_data_ptr(), ordered.const_data_ptr<float>(), 203, 0, 7,
                      y.mutable_data_ptr<float>());
      // int8 codes are about a hundred times as large.
      EXPECT_LT((y - expected).abs().max().item<double>(), type == FactorType::kInt8 ? 1e-2 : 1e-4) << kernels.name;
    }
    for (int64_t bits = 2; bits <= 8; ++bits) {
      for (const bool symmetric : {true, false}) {
        const DecodeCase c{
            11, 1152, 40, {.num_bits = bits, .symmetric = symmetric, .strategy = Strategy::kGroup, .group_size = 64}};
        const TestLinear linear = random_linear(c);
        const Tensor token = at::randn({c.in_features});
        ASSERT_LT(relative_error(decode_linear(linear.packed, token, kernels), linear, token), 1e-6)
            << kernels.name << " " << name(c);
      }
    }
  }
}

TEST(DecodeLinear, AnswersInTheShapeAndDtypeOfTheToken) {
  at::manual_seed(5);
  const TestLinear linear = random_linear({24, 64, 8, {.num_bits = 4}});
  const Tensor x = at::randn({64}).to(at::kBFloat16);
  const Tensor y = decode_linear(linear.packed, x.unsqueeze(0));
  EXPECT_EQ(y.sizes(), (at::IntArrayRef{1, 24}));
  EXPECT_EQ(y.scalar_type(), at::kBFloat16);
  EXPECT_TRUE(at::equal(y, decode_linear(linear.packed, x.to(at::kFloat)).to(at::kBFloat16).unsqueeze(0)));
}

TEST(DecodeLinear, DoesNotDependOnTheNumberOfThreads) {
  at::manual_seed(6);
  const TestLinear linear =
      random_linear({512, 1024, 16, {.num_bits = 3, .strategy = Strategy::kGroup, .group_size = 64}});
  const Tensor x = at::randn({1024});
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const Tensor one = decode_linear(linear.packed, x);
  at::set_num_threads(2);
  const Tensor two = decode_linear(linear.packed, x);
  at::set_num_threads(threads);
  EXPECT_TRUE(at::equal(one, two));
}

TEST(DecodeLinear, ALargeMeanOfTheInputsCostsNoAccuracy) {
  at::manual_seed(7);
  for (const bool symmetric : {true, false}) {
    const TestLinear linear = random_linear({64, 4096, 0, {.num_bits = 4, .symmetric = symmetric}});
    const Tensor x = at::randn({4096}) + 10;
    EXPECT_LT(relative_error(decode_linear(linear.packed, x), linear, x), 2e-6);
  }
}

TEST(DecodeLinear, TensorsMayBeViews) {
  at::manual_seed(8);
  const TestLinear linear =
      random_linear({33, 320, 7, {.num_bits = 3, .strategy = Strategy::kGroup, .group_size = 32}});
  const Tensor x = at::randn({320, 2}).select(1, 1);
  PackedLinear views = linear.packed;
  views.lora.A = views.lora.A.t().contiguous().t();
  views.lora.B = at::constant_pad_nd(views.lora.B, {1, 0}).slice(1, 1);
  views.weight_packed = at::constant_pad_nd(views.weight_packed, {2, 3}).slice(1, 2, 32);
  EXPECT_TRUE(at::equal(decode_linear(views, x), decode_linear(linear.packed, x.contiguous())));
}

/// What decode_linear says about `linear` and a token of `in_features` numbers.
std::string refusal(const PackedLinear& linear, const Tensor& x) {
  try {
    decode_linear(linear, x);
  } catch (const c10::Error& e) {
    return e.what_without_backtrace();
  }
  return "";
}

TEST(DecodeLinear, WrongShapesAreNamed) {
  const PackedLinear good =
      random_linear({16, 128, 4, {.num_bits = 4, .strategy = Strategy::kGroup, .group_size = 32}}).packed;
  const Tensor x = at::randn({128});
  EXPECT_EQ(refusal(good, x), "");
  const auto expect = [&](const std::function<void(PackedLinear&)>& change, const std::string& words) {
    PackedLinear bad = good;
    change(bad);
    EXPECT_NE(refusal(bad, x).find(words), std::string::npos) << refusal(bad, x);
  };
  EXPECT_NE(refusal(good, at::randn({64})).find("x is Float [64]"), std::string::npos);
  EXPECT_NE(refusal(good, at::randn({2, 128})).find("one token"), std::string::npos);
  EXPECT_NE(refusal(good, at::zeros({128}, at::kInt)).find("x is Int"), std::string::npos);
  EXPECT_NE(refusal(good, Tensor()).find("there is no x"), std::string::npos);
  expect([](PackedLinear& l) { l.spec.num_bits = 9; }, "num_bits is 9");
  expect([](PackedLinear& l) { l.spec.num_bits = 3; }, "weight_packed is Int [16, 16] on cpu, expected Int [16, 12]");
  expect([](PackedLinear& l) { l.spec.group_size = 20; }, "group_size is 20");
  expect([](PackedLinear& l) { l.spec.group_size = 48; }, "group_size is 48");
  expect([](PackedLinear& l) { l.spec.strategy = Strategy::kToken; }, "one of activations");
  expect([](PackedLinear& l) { l.in_features = 0; }, "in_features is 0");
  expect([](PackedLinear& l) { l.weight_packed = Tensor(); }, "weight_packed is not a matrix");
  expect([](PackedLinear& l) { l.weight_scale = Tensor(); }, "no weight_scale");
  expect([](PackedLinear& l) { l.weight_scale = l.weight_scale.slice(0, 1); }, "weight_scale is Float [15, 4]");
  expect([](PackedLinear& l) { l.weight_scale = l.weight_scale.to(at::kDouble); }, "weight_scale is Double");
  expect([](PackedLinear& l) { l.spec.symmetric = false; }, "no weight_zero_point");
  expect([](PackedLinear& l) { l.weight_zero_point = at::zeros({2, 4}, at::kInt); }, "symmetric grid has zero points");
  expect([](PackedLinear& l) { l.lora.B = Tensor(); }, "only one of lora_A and lora_B");
  expect([](PackedLinear& l) { l.lora.A = l.lora.A.to(at::kFloat); }, "lora_A is Float");
  expect([](PackedLinear& l) { l.lora.A = l.lora.A.slice(1, 1); }, "lora_A is BFloat16 [4, 127]");
  expect([](PackedLinear& l) { l.lora.B = l.lora.B.slice(1, 1); }, "lora_B is BFloat16 [16, 3]");
  expect([](PackedLinear& l) { l.lora.B = l.lora.B.to(at::kChar); }, "lora_B is Char");
  expect([](PackedLinear& l) { l.lora.A_scale = at::ones({4, 1}); }, "int8 factors and only they have scales");
  expect(
      [](PackedLinear& l) {
        l.lora = store_factors(at::randn({4, 128}), at::randn({16, 4}), at::kChar);
        l.lora.B_scale = l.lora.B_scale.t();
      },
      "lora_B_scale is Float [4, 1]");
  expect([](PackedLinear& l) { l.bias = at::zeros({15}); }, "bias is Float [15]");
}

}  // namespace
}  // namespace baseq
