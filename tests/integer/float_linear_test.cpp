#include "integer/float_linear.h"

#include <gtest/gtest.h>

#include "../random_tensors.h"

namespace baseq {
namespace {

TEST(FloatLinear, IsTheProductWhateverTypeAndKernels) {
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kHalf}) {
    for (const auto& [out, in] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {16, 4}, {35, 27}, {130, 64}}) {
      const Tensor weight = test::random_normal({out, in}, 1, at::kFloat).to(type);
      const Tensor bias = test::random_normal({out}, 2, at::kFloat), x = test::random_normal({70, in}, 3, at::kFloat);
      const FloatLinear linear(weight, bias);
      const Tensor expected = at::linear(x.to(at::kDouble), weight.to(at::kDouble), bias.to(at::kDouble));
      const Tensor y = linear.forward(x, kScalarKernels);
      EXPECT_LT(test::relative_error(y, expected), 1e-6) << type << " " << out << " x " << in;
      for (int64_t i = 0; i < kNumIntegerKernels; ++i) {
        if (!kIntegerKernels[i]->supported()) continue;
        EXPECT_TRUE(at::equal(linear.forward(x, *kIntegerKernels[i]), y)) << kIntegerKernels[i]->name;
        EXPECT_TRUE(at::equal(linear.forward(x.narrow(0, 66, 1), *kIntegerKernels[i]), y.narrow(0, 66, 1)));
      }
    }
  }
}

}  // namespace
}  // namespace baseq
