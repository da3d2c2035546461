#pragma once

#include <cstdint>

/// The inner loop of the clip search, in one version for each instruction set.
namespace baseq {

/// Grids that are compared side by side: one in each lane of a vector.
inline constexpr int64_t kGridsAtOnce = 16;

/// position = (x - base) / scale + zero_point, code = clamp(round(position), low, high), halves to even.
struct GridLanes {
  float inverse[kGridsAtOnce];  ///< 1 / scale
  float zero_point[kGridsAtOnce], base[kGridsAtOnce];
  float low = 0, high = 0;  ///< the codes of all of them
};

/// sums[g] += sum over x of importance * |code - position|^norm, to about 1e-6 of itself: the distortion in units of
/// the scale. A null importance is 1.
void add_distortions(const float* x, const float* importance, int64_t n, const GridLanes& grids, float norm,
                     double* sums);

/// values[g]^norm of kGridsAtOnce values above zero, to about 1e-6 of itself.
void raise_to_power(float* values, float norm);

}  // namespace baseq
