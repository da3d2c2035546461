#include "../../src/quant/finite.h"

#include <gtest/gtest.h>

#include <limits>

#include "../tiny_model.h"

namespace baseq {
namespace {

constexpr at::ScalarType kTypes[] = {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16};

TEST(AllFinite, FindsOneValueAnywhere) {
  uint64_t seed = 1;
  for (const at::ScalarType dtype : kTypes) {
    for (const int64_t count : {1, 7, 4096, 300'001}) {
      const Tensor x = test::random_normal({count}, seed++, dtype);
      EXPECT_TRUE(all_finite(x)) << dtype << count;
      for (const double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
                               -std::numeric_limits<double>::infinity()}) {
        for (const int64_t where : {int64_t{0}, test::random_ids({1}, count, seed++).item<int64_t>(), count - 1}) {
          Tensor wrong = x.clone();
          wrong[where] = bad;
          EXPECT_FALSE(all_finite(wrong)) << dtype << " " << count << " " << where << " " << bad;
        }
      }
    }
  }
}

TEST(AllFinite, TheEndsOfTheRangeAreFinite) {
  const Tensor ends = at::tensor({std::numeric_limits<float>::max(), -std::numeric_limits<float>::max(), 0.0F, -0.0F,
                                  std::numeric_limits<float>::denorm_min()});
  EXPECT_TRUE(all_finite(ends));
  EXPECT_TRUE(all_finite(at::full({100}, 65504).to(at::kHalf)));
  EXPECT_TRUE(all_finite(at::empty({0, 3})));
}

TEST(AllFinite, LooksAtAViewAndNotBesideIt) {
  Tensor x = at::zeros({6, 8});
  x[2][3] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_FALSE(all_finite(x.t()));
  EXPECT_FALSE(all_finite(x.select(1, 3)));
  EXPECT_TRUE(all_finite(x.select(1, 4)));
  EXPECT_TRUE(all_finite(x.narrow(0, 3, 3)));
}

}  // namespace
}  // namespace baseq
