#pragma once

#include <cstdint>

#include "baseq/tensor.h"

namespace baseq {

/// A random orthogonal matrix of the Haar measure, float64 [n, n]; the same for the same seed.
Tensor random_rotation(int64_t n, uint64_t seed);

/// A seed for the `index`-th of several independent choices under one seed.
uint64_t derived_seed(uint64_t seed, uint64_t index);

}  // namespace baseq
