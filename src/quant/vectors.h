#pragma once

#include <bit>
#include <cstdint>
#include <utility>

// Vectors as arguments, of functions that are all inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace baseq {

/// kLanes values side by side: as many as a register of the instruction set holds. All functions on them are inlined
/// into one version for each instruction set. Spelled out for each size: g++ drops such an attribute from a type that
/// depends on a template parameter.
template <int kLanes>
struct Vectors;
template <>
struct Vectors<16> {
  using Floats = float __attribute__((vector_size(64), aligned(4), may_alias));
  using Ints = int32_t __attribute__((vector_size(64), aligned(4), may_alias));
  using Words = uint32_t __attribute__((vector_size(64), aligned(4), may_alias));
  using Unaligned = uint32_t __attribute__((vector_size(64), aligned(1), may_alias));
};
template <>
struct Vectors<8> {
  using Floats = float __attribute__((vector_size(32), aligned(4), may_alias));
  using Ints = int32_t __attribute__((vector_size(32), aligned(4), may_alias));
  using Words = uint32_t __attribute__((vector_size(32), aligned(4), may_alias));
  using Unaligned = uint32_t __attribute__((vector_size(32), aligned(1), may_alias));
};
template <>
struct Vectors<4> {
  using Floats = float __attribute__((vector_size(16), aligned(4), may_alias));
  using Ints = int32_t __attribute__((vector_size(16), aligned(4), may_alias));
  using Words = uint32_t __attribute__((vector_size(16), aligned(4), may_alias));
  using Unaligned = uint32_t __attribute__((vector_size(16), aligned(1), may_alias));
};
template <int kLanes>
using Floats = typename Vectors<kLanes>::Floats;
template <int kLanes>
using Words = typename Vectors<kLanes>::Words;

template <int kLanes>
[[gnu::always_inline]] inline Floats<kLanes> load(const float* values) {
  return *reinterpret_cast<const Floats<kLanes>*>(values);
}

/// Lanes kFirst + i of `lanes`.
template <int kLanes, int kFirst, int... i>
[[gnu::always_inline]] inline Floats<kLanes / 2> half_of(const Floats<kLanes>& lanes,
                                                         std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(lanes, lanes, (kFirst + i)...);
}

template <int kLanes>
[[gnu::always_inline]] inline float sum(const Floats<kLanes>& lanes) {
  if constexpr (kLanes == 4) {
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
  } else {
    constexpr auto kHalf = std::make_integer_sequence<int, kLanes / 2>{};
    return sum<kLanes / 2>(half_of<kLanes, 0>(lanes, kHalf) + half_of<kLanes, kLanes / 2>(lanes, kHalf));
  }
}

/// Zeros behind half as many lanes.
template <int kLanes, int... i>
[[gnu::always_inline]] inline Floats<kLanes> widened(const Floats<kLanes / 2>& lanes,
                                                     std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(lanes, Floats<kLanes / 2>{}, i...);
}

[[gnu::always_inline]] inline float from_bfloat16(uint16_t value) {
  return std::bit_cast<float>(uint32_t{value} << 16);
}

/// Denormal numbers included; infinities become 65536 and more.
[[gnu::always_inline]] inline float from_half(uint16_t value) {
  constexpr float kTwoTo112 = 5.192296858534828e33F;
  const float magnitude = std::bit_cast<float>((value & 0x7fffU) << 13) * kTwoTo112;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | ((value & 0x8000U) << 16));
}

}  // namespace baseq
