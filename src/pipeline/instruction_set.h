#pragma once

#include <string>

#include "baseq/tensor.h"

namespace baseq {

/// What decides about the last bits of a result on this machine's processor: the kernels that LibTorch chooses and the
/// extensions by which this program and oneDNN choose theirs, such as "AVX2 (avx2 fma)".
std::string instruction_set();

/// Whether this processor multiplies matrices of `dtype` itself, as far as that is known; one that does not works on
/// them in float32, with conversions on the way.
bool multiplies(at::ScalarType dtype);

}  // namespace baseq
