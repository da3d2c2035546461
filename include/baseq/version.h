#pragma once

#include <string>

namespace baseq {

/// The version of the library that runs, such as "0.1.0".
std::string version();

/// What decides about the last bits of a result on this machine's processor: the kernels that LibTorch chooses and the
/// extensions by which this library and oneDNN choose theirs, such as "AVX2 (avx2 fma)".
std::string instruction_set();

}  // namespace baseq
