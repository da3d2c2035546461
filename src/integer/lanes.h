#pragma once

#include "registers.h"

/// Float functions of docs/arithmetic.md on the lanes of a register, inlined into a version for each instruction set.
namespace baseq {

template <class Isa>
[[gnu::always_inline]] inline typename Isa::Floats load(const float* values) {
  return *reinterpret_cast<const typename Isa::Floats*>(values);
}
template <class Isa>
[[gnu::always_inline]] inline void store(float* values, const typename Isa::Floats& lanes) {
  *reinterpret_cast<typename Isa::Floats*>(values) = lanes;
}

template <class Isa>
[[gnu::always_inline]] inline typename Isa::Ints lane_numbers() {
  typename Isa::Ints result = {};
  for (int i = 0; i < Isa::kLanes; ++i) result[i] = i;
  return result;
}

/// The second where it is larger: a NaN there is left out.
template <class Isa>
[[gnu::always_inline]] inline typename Isa::Floats larger(const typename Isa::Floats& a,
                                                          const typename Isa::Floats& b) {
  return b > a ? b : a;
}

template <class Isa>
[[gnu::always_inline]] inline typename Isa::Floats magnitude(const typename Isa::Floats& x) {
  return reinterpret_cast<typename Isa::Floats>(reinterpret_cast<typename Isa::Words>(x) & 0x7fffffffU);
}

/// Lane i + kBy in lane i, around the end.
template <class Isa, int kBy, int... i>
[[gnu::always_inline]] inline typename Isa::Floats turned(const typename Isa::Floats& x,
                                                          std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(x, x, ((i + kBy) % Isa::kLanes)...);
}
template <class Isa, int kBy>
[[gnu::always_inline]] inline typename Isa::Floats turned(const typename Isa::Floats& x) {
  return turned<Isa, kBy>(x, std::make_integer_sequence<int, Isa::kLanes>{});
}

template <class Isa, int kHalf = Isa::kLanes / 2>
[[gnu::always_inline]] inline float largest_lane(const typename Isa::Floats& x) {
  const typename Isa::Floats result = larger<Isa>(x, turned<Isa, kHalf>(x));
  if constexpr (kHalf == 1) {
    return result[0];
  } else {
    return largest_lane<Isa, kHalf / 2>(result);
  }
}

/// The nearest whole number, halves to even; magnitudes below 2^22.
template <class Isa>
[[gnu::always_inline]] inline typename Isa::Floats rounded(const typename Isa::Floats& x) {
  constexpr float kRounder = 12582912.0F;  // 1.5 * 2^23, whose last bit is worth 1
  return (x + kRounder) - kRounder;
}

template <class Isa, int kHalf = Isa::kLanes / 2>
[[gnu::always_inline]] inline float sum_of_register(const typename Isa::Floats& x) {
  const typename Isa::Floats result = x + turned<Isa, kHalf>(x);
  if constexpr (kHalf == 1) {
    return result[0];
  } else {
    return sum_of_register<Isa, kHalf / 2>(result);
  }
}

/// The sum of 16 lanes in 16 / kLanes registers: lanes 8 to 15 are added to lanes 0 to 7, then 4 to 7 to 0 to 3, until
/// one is left.
template <class Isa>
[[gnu::always_inline]] inline float sum_of_lanes(const typename Isa::Floats* parts) {
  if constexpr (Isa::kLanes == 16) {
    return sum_of_register<Isa>(parts[0]);
  } else if constexpr (Isa::kLanes == 8) {
    return sum_of_register<Isa>(parts[0] + parts[1]);
  } else {
    return sum_of_register<Isa>((parts[0] + parts[2]) + (parts[1] + parts[3]));
  }
}

/// exp(x) for x <= 0, of e^-87 below that, to 1e-7 of itself. NaN stays NaN.
template <class Isa>
[[gnu::always_inline]] inline typename Isa::Floats exp_of_negative(typename Isa::Floats x) {
  using Floats = typename Isa::Floats;
  using Ints = typename Isa::Ints;
  x = x < -87.0F ? Floats{} - 87.0F : x;
  const Floats power = rounded<Isa>(x * 1.44269504F);
  Floats rest = x;
  Isa::fma(rest, power, Floats{} - 0.693359375F);
  Isa::fma(rest, power, Floats{} + 2.12194440e-4F);
  // A polynomial of Cephes (S. Moshier) for exp on [-ln 2 / 2, ln 2 / 2].
  Floats value = Floats{} + 1.9875691500e-4F;
  constexpr float kCoefficients[] = {1.3981999507e-3F, 8.3334519073e-3F, 4.1665795894e-2F, 1.6666665459e-1F,
                                     5.0000001201e-1F};
  repeat<5>([&](auto i) __attribute__((always_inline)) {
    Floats next = Floats{} + kCoefficients[i];
    Isa::fma(next, value, rest);
    value = next;
  });
  Floats result = rest + 1.0F;
  Isa::fma(result, value, rest * rest);
  const Ints exponent = (__builtin_convertvector(power, Ints) + 127) << 23;
  return result * reinterpret_cast<Floats>(exponent);
}

template <class Isa>
[[gnu::always_inline]] inline typename Isa::Floats as_floats(const typename Isa::Words& words) {
  return __builtin_convertvector(reinterpret_cast<typename Isa::Ints>(words), typename Isa::Floats);
}

}  // namespace baseq
