#pragma once

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <cmath>

#include "baseq/tensor.h"

namespace baseq::test {

inline at::Generator generator(uint64_t seed) { return at::make_generator<at::CPUGeneratorImpl>(seed); }

inline Tensor random_normal(at::IntArrayRef sizes, uint64_t seed, at::ScalarType dtype = at::kDouble) {
  return at::randn(sizes, generator(seed), at::kDouble).to(dtype);
}

/// Well conditioned square matrices: perturbed identities.
inline Tensor invertible(at::IntArrayRef sizes, uint64_t seed) {
  const auto size = static_cast<double>(sizes.back());
  return at::eye(sizes.back(), at::kDouble) + random_normal(sizes, seed) * (0.3 / std::sqrt(size));
}

/// |got - expected| / |expected| in float64.
inline double relative_error(const Tensor& got, const Tensor& expected) {
  const Tensor wanted = expected.to(at::kDouble);
  return ((got.to(at::kDouble) - wanted).norm() / wanted.norm()).item<double>();
}

}  // namespace baseq::test
