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

/// 16 lanes in 16 / kLanes registers become those of one: lanes 8 to 15 are added to lanes 0 to 7, then 4 to 7 to 0 to
/// 3, down to the lanes of a register.
template <class Isa>
[[gnu::always_inline]] inline typename Isa::Floats in_one_register(const typename Isa::Floats* parts) {
  if constexpr (Isa::kLanes == 16) {
    return parts[0];
  } else if constexpr (Isa::kLanes == 8) {
    return parts[0] + parts[1];
  } else {
    return (parts[0] + parts[2]) + (parts[1] + parts[3]);
  }
}
/// Their sum: the same additions until one lane is left.
template <class Isa>
[[gnu::always_inline]] inline float sum_of_lanes(const typename Isa::Floats* parts) {
  return sum_of_register<Isa>(in_one_register<Isa>(parts));
}

/// Lanes of a and b in runs of 2 * kHalf: the first or second half of each run, those of a before those of b.
template <class Isa, int kHalf, bool kSecond, int... i>
[[gnu::always_inline]] inline typename Isa::Floats halves_of_runs(const typename Isa::Floats& a,
                                                                  const typename Isa::Floats& b,
                                                                  std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (i / kHalf * 2 * kHalf + i % kHalf + (kSecond ? kHalf : 0))...);
}

/// op over the lanes of each of kCount registers, as sum_of_register does it for one: out[i] is that of register i.
/// With padding, at most 16 values are written.
template <class Isa, int kCount, int kHalf = Isa::kLanes / 2, class Op>
[[gnu::always_inline]] inline void across_lanes(const typename Isa::Floats* registers, float* out, const Op& op) {
  using Floats = typename Isa::Floats;
  constexpr int kPairs = (kCount + 1) / 2;
  constexpr std::make_integer_sequence<int, Isa::kLanes> kLaneNumbers{};
  Floats joined[kPairs];
  repeat<kPairs>([&](auto i) __attribute__((always_inline)) {
    const Floats &a = registers[2 * i], &b = registers[2 * i + 1 < kCount ? 2 * i + 1 : 2 * i];
    joined[i] =
        op(halves_of_runs<Isa, kHalf, false>(a, b, kLaneNumbers), halves_of_runs<Isa, kHalf, true>(a, b, kLaneNumbers));
  });
  if constexpr (kHalf == 1) {
    repeat<kPairs>([&](auto i) __attribute__((always_inline)) { store<Isa>(out + i * Isa::kLanes, joined[i]); });
  } else {
    across_lanes<Isa, kPairs, kHalf / 2>(joined, out, op);
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
