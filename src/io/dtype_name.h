#pragma once

#include <c10/core/ScalarType.h>

namespace baseq {

/// The name of a dtype in safetensors files ("F32", "BF16", "I8"); PyTorch's for one that they do not have.
const char* dtype_name(at::ScalarType dtype);

}  // namespace baseq
