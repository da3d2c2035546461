#pragma once

#include "baseq/tensor.h"

namespace baseq {

/// Whether no value of a floating tensor is NaN or infinite: one pass, without temporaries where the tensor is
/// contiguous and on the CPU.
bool all_finite(const Tensor& tensor);

}  // namespace baseq
