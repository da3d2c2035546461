#pragma once

#include "baseq/tensor.h"
#include "baseq/version.h"

namespace baseq {

/// Whether this processor multiplies matrices of `dtype` itself, as far as that is known; one that does not works on
/// them in float32, with conversions on the way.
bool multiplies(at::ScalarType dtype);

}  // namespace baseq
