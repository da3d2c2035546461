#include "transform/random_rotation.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

namespace baseq {

Tensor random_rotation(int64_t n, uint64_t seed) {
  TORCH_CHECK(n >= 1, "random_rotation: the size is ", n, ", expected at least 1");
  const auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  const auto [q, r] = at::linalg_qr(at::randn({n, n}, generator, at::kDouble));
  // With a positive diagonal of R the distribution is that of Haar.
  return (q * at::where(r.diagonal().ge(0), 1.0, -1.0)).contiguous();
}

// SplitMix64, Steele et al. 2014.
uint64_t derived_seed(uint64_t seed, uint64_t index) {
  uint64_t z = seed + (index + 1) * 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

}  // namespace baseq
