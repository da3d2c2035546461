#pragma once

#include <Eigen/Core>
#include <cstdint>
#include <vector>

namespace baseq {

/// Entries are +1 and -1.
using SignMatrix = Eigen::Matrix<int8_t, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// The orders of the factors of H = H_m1 (x) H_m2 (x) ... (x) H_2^k, the power of two last (1 where there is none): the
/// decomposition that is cheapest to apply. Empty when n has no construction.
std::vector<int64_t> hadamard_factors(int64_t n);

/// The factor itself: Sylvester's matrix for a power of two, else Paley I, Paley II or Williamson. H H^T = order * I.
SignMatrix hadamard_signs(int64_t order);

}  // namespace baseq
