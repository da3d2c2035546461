#pragma once

#include "baseq/tensor.h"

namespace baseq {

/// hadamard_transform from ATen products alone, one per factor: the path of every device that has no kernel of its own.
/// x [.., n] with `block` dividing n.
Tensor hadamard_by_products(const Tensor& x, int64_t block, bool transpose);

}  // namespace baseq
