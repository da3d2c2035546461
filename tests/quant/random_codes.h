#pragma once

#include <ATen/ATen.h>

namespace baseq::test {

/// int8 [rows, columns]: any code of `num_bits` bits, by PyTorch's own generator.
inline at::Tensor random_codes(int64_t rows, int64_t columns, int64_t num_bits) {
  return at::randint(-(1 << (num_bits - 1)), 1 << (num_bits - 1), {rows, columns}, at::kChar);
}

}  // namespace baseq::test
