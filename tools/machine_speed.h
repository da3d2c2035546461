#pragma once

namespace baseq::cli {

/// What this machine reads from memory with the threads that LibTorch uses, in bytes a second. Takes half a second.
double measure_read_bandwidth();
/// Its 8-bit multiplications and additions a second, in registers alone; 0 where no instruction for them is known.
double measure_multiply_peak();

}  // namespace baseq::cli
