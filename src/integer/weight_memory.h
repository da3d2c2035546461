#pragma once

#include <cstdint>

#include "baseq/tensor.h"

namespace baseq {

/// Zeroed memory for weights, uint8 [bytes] at a multiple of 64 bytes. Neighbours share chunks of huge pages: products
/// of one token read all weights once, and with small pages a tenth of their time goes into addresses. A chunk is freed
/// with the last tensor in it. Safe from any thread.
Tensor weight_memory(int64_t bytes);

}  // namespace baseq
