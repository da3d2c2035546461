#include "sealed_device.h"

#include <gtest/gtest.h>

#include "../random_tensors.h"

namespace baseq {
namespace {

using test::CountedWork;
using test::live_bytes;
using test::random_normal;
using test::sealed_device;

Tensor sealed(const Tensor& t) { return t.to(sealed_device()); }

TEST(SealedDevice, ComputesAsTheCpuDoes) {
  const Tensor w = random_normal({6, 5}, 1, at::kFloat), x = random_normal({4, 5}, 2, at::kFloat);
  const auto loss_of = [](const Tensor& weight, const Tensor& input) {
    return at::silu(at::linear(input, weight)).square().sum();
  };
  Tensor leaf = w.clone().requires_grad_(true), sealed_leaf = sealed(w).requires_grad_(true);
  loss_of(leaf, x).backward();
  loss_of(sealed_leaf, sealed(x)).backward();
  EXPECT_EQ(sealed_leaf.grad().device(), sealed_device());
  EXPECT_LT(test::relative_error(sealed_leaf.grad().cpu(), leaf.grad()), 1e-6);

  const Tensor moments = at::matmul(x.t(), x).to(at::kDouble) + at::eye(5, at::kDouble);
  EXPECT_TRUE(at::equal(at::linalg_cholesky(sealed(moments)).cpu(), at::linalg_cholesky(moments)));
  Tensor changed = sealed(x.clone());
  changed.slice(0, 1, 3).mul_(2);
  Tensor expected = x.clone();
  expected.slice(0, 1, 3).mul_(2);
  EXPECT_TRUE(at::equal(changed.cpu(), expected)) << "views share memory";
  EXPECT_TRUE(at::isnan(at::empty({3}, at::TensorOptions(sealed_device()))).all().item<bool>());
}

TEST(SealedDevice, HasANameThatIsReadBack) {
  EXPECT_EQ(sealed_device().str(), "sealed:0");
  EXPECT_EQ(at::Device("sealed:0"), sealed_device());
}

TEST(SealedDevice, RefusesToMixDevices) {
  const Tensor x = random_normal({4}, 1), y = sealed(x);
  EXPECT_THROW((void)(x + y), c10::Error);
  EXPECT_THROW((void)(y + x), c10::Error);
  EXPECT_THROW((void)y.index_select(0, at::arange(2)), c10::Error);
  EXPECT_THROW((void)at::randn({3}, test::generator(1), at::TensorOptions(sealed_device())), c10::Error);
  EXPECT_TRUE(at::equal((y * at::scalar_tensor(2.0, at::kDouble)).cpu(), x * 2)) << "scalars go anywhere";
}

TEST(SealedDevice, CountsWhatIsAskedOfIt) {
  const Tensor x = random_normal({4, 3}, 1);
  const CountedWork counted;
  const Tensor y = sealed(x);
  const Tensor z = (y.t().view({3, 4}) * 2).sum();
  EXPECT_DOUBLE_EQ(z.item<double>(), (x * 2).sum().item<double>());
  (void)y.cpu();
  const test::DeviceWork work = counted.so_far();
  EXPECT_EQ(work.operations, 2);
  EXPECT_EQ(work.names.at("aten::mul"), 1);
  EXPECT_EQ(work.scalars, 1);
  EXPECT_EQ(work.to_device, 1);
  EXPECT_EQ(work.to_host, 1);
}

TEST(SealedDevice, ItsMemoryEnds) {
  const int64_t before = live_bytes();
  const test::LimitedMemory limit(before + (64 << 10));
  const Tensor fits = at::zeros({8192}, at::TensorOptions(sealed_device()));
  EXPECT_GE(live_bytes(), before + (32 << 10));
  EXPECT_THROW((void)at::zeros({16384}, at::TensorOptions(sealed_device())), c10::OutOfMemoryError);
}



TEST(SealedDeviceDeathTest, TheHostCannotReadIt) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const Tensor x = sealed(random_normal({4}, 1));
  EXPECT_EXIT(std::printf("%f", x.const_data_ptr<double>()[0]), testing::KilledBySignal(SIGSEGV), "");
}

}  // namespace
}  // namespace baseq
