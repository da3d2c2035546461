#include "distortion_kernel.h"

#include <algorithm>

// Vectors as arguments, of functions that are all inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace baseq {
namespace {

// The compiler splits these vectors where registers are shorter.
using Lanes = float __attribute__((vector_size(64), aligned(4), may_alias));
using IntLanes = int32_t __attribute__((vector_size(64), aligned(4), may_alias));

/// Adding and taking away 1.5 * 2^23 rounds |x| < 2^22 to the nearest integer, halves to even.
constexpr float kRounder = 12582912.0F;
/// Values that are summed in float32 before the sum goes on in float64.
constexpr int64_t kSegment = 1024;

[[gnu::always_inline]] inline const Lanes& lanes(const float* values) {
  return *reinterpret_cast<const Lanes*>(values);
}

/// x^norm for x >= 0 as 2^(norm * log2 x); the library's power would take most of the time of a search.
[[gnu::always_inline]] inline Lanes power(const Lanes& x, float norm) {
  // x = (1 + u) * 2^exponent with 1 + u between sqrt(1/2) and sqrt(2). Both polynomials interpolate at Chebyshev's
  // nodes.
  const IntLanes bits = (IntLanes)x;
  const IntLanes exponent = (bits - 0x3f3504f3) >> 23;
  const Lanes u = (Lanes)(bits - (exponent << 23)) - 1.0F;
  Lanes log2_over_u = u * 0.168186591F - 0.267963871F;
  log2_over_u = log2_over_u * u + 0.296119557F;
  log2_over_u = log2_over_u * u - 0.359524455F;
  log2_over_u = log2_over_u * u + 0.480613125F;
  log2_over_u = log2_over_u * u - 0.721360179F;
  log2_over_u = log2_over_u * u + 1.44269652F;
  Lanes y = norm * (log2_over_u * u + __builtin_convertvector(exponent, Lanes));
  const Lanes least = Lanes{} - 125.0F, most = Lanes{} + 127.0F;
  y = y < least ? least : y;
  y = y > most ? most : y;
  const Lanes shifted = y + kRounder;
  const Lanes z = y - (shifted - kRounder);
  Lanes fraction = z * 0.00133908634F + 0.00967603192F;
  fraction = fraction * z + 0.0555035711F;
  fraction = fraction * z + 0.240221075F;
  fraction = fraction * z + 0.693147188F;
  fraction = fraction * z + 1.0F;
  // The last bits of `shifted` are the integer; into the exponent with them.
  return (Lanes)((IntLanes)fraction + ((IntLanes)shifted << 23));
}

/// Clang takes no vector from a function for fewer instructions than the caller's, not even from an inlined one.
[[gnu::always_inline]] inline void raise_lanes(float* values, float norm) {
  *reinterpret_cast<Lanes*>(values) = power(lanes(values), norm);
}

/// One value under all grids.
template <bool kSquares>
[[gnu::always_inline]] inline Lanes distortion(float x, const GridLanes& grids, float norm) {
  const Lanes low = Lanes{} + grids.low, high = Lanes{} + grids.high;
  const Lanes position = (x - lanes(grids.base)) * lanes(grids.inverse) + lanes(grids.zero_point);
  Lanes code = position < low ? low : position;
  code = code > high ? high : code;
  code = (code + kRounder) - kRounder;
  const Lanes distance = code - position;
  if constexpr (kSquares) return distance * distance;
  return power((Lanes)((IntLanes)distance & 0x7fffffff), norm);
}

template <bool kSquares, bool kWeighted>
[[gnu::always_inline]] inline void add_all(const float* x, const float* importance, int64_t n, const GridLanes& grids,
                                           float norm, double* sums) {
  for (int64_t begin = 0; begin < n; begin += kSegment) {
    const int64_t end = std::min(begin + kSegment, n);
    Lanes sum{};
    for (int64_t i = begin; i < end; ++i) {
      const Lanes term = distortion<kSquares>(x[i], grids, norm);
      sum += kWeighted ? importance[i] * term : term;
    }
    for (int64_t lane = 0; lane < kGridsAtOnce; ++lane) sums[lane] += sum[lane];
  }
}

}  // namespace

__attribute__((target_clones("avx512f", "avx2", "default"))) void add_distortions(const float* x,
                                                                                  const float* importance, int64_t n,
                                                                                  const GridLanes& grids, float norm,
                                                                                  double* sums) {
  if (norm == 2) {
    importance != nullptr ? add_all<true, true>(x, importance, n, grids, norm, sums)
                          : add_all<true, false>(x, importance, n, grids, norm, sums);
  } else {
    importance != nullptr ? add_all<false, true>(x, importance, n, grids, norm, sums)
                          : add_all<false, false>(x, importance, n, grids, norm, sums);
  }
}

__attribute__((target_clones("avx512f", "avx2", "default"))) void raise_to_power(float* values, float norm) {
  raise_lanes(values, norm);
}

}  // namespace baseq
