#pragma once

#include <cstdint>
#include <vector>

#include "hadamard_construction.h"

namespace baseq {

/// A dense factor in the form the kernel reads: its inputs in groups of four, and for each output and group the signs
/// of the four terms as one of 16 codes. Every output then costs one addition per group, taken from a table of the
/// group's 16 signed sums, instead of four.
struct SignFactor {
  int64_t order;
  std::vector<uint8_t> codes;  // [order, order / 4]

  /// The factor H of x H.
  explicit SignFactor(const SignMatrix& h);
};

/// H_m1 (x) H_m2 (x) ... (x) H_2^k with its scale, ready to be applied on the CPU.
struct HadamardKernel {
  std::vector<SignFactor> factors;
  int64_t power_of_two = 1;
  int64_t size = 1;    ///< product of all orders
  double scale = 1.0;  ///< 1 / sqrt(size)
};

/// y = x H * scale for contiguous x and y [rows, size] that do not overlap. Each row's result depends neither on the
/// number of rows nor on the number of threads.
void hadamard_rows(const float* x, float* y, int64_t rows, const HadamardKernel& kernel);
void hadamard_rows(const double* x, double* y, int64_t rows, const HadamardKernel& kernel);

}  // namespace baseq
