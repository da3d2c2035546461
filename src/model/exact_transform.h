#pragma once

#include "baseq/transform/transform.h"

namespace baseq {

/// apply_transform of float32 x, and with `inverse_transpose` apply_inverse_transpose, in the order of
/// docs/arithmetic.md. No gradients.
Tensor exact_transform(const Transform& transform, const Tensor& x, bool inverse_transpose = false);

}  // namespace baseq
