#pragma once

#include <string>

#pragma GCC visibility push(default)
namespace baseq {

/// The version of the library that runs, such as "0.2.0"; `find_package(baseq 0.2)` asks for that of the headers.
///
///     std::printf("baseq %s, %s\n", baseq::version().c_str(), baseq::instruction_set().c_str());
std::string version();

/// The properties of this processor that the last bits of a result depend on: LibTorch's choice of kernels, and the
/// extensions by which this library and oneDNN choose theirs, such as "AVX2 (avx2 fma)".
std::string instruction_set();

}  // namespace baseq
#pragma GCC visibility pop
