#pragma once

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // asm writes what it is given by reference

#include <algorithm>
#include <cstring>

#include "panel_arithmetic.h"
#include "registers.h"

/// Kernels for processors that multiply and add four unsigned bytes by four signed ones at once, inlined into a version
/// for each width of register.
///
/// Few rows of activations are multiplied while codes are unpacked in registers, at the speed of memory. For many, a
/// block of them is laid out tile by tile, a panel or two unpacked to bytes, and tiles of sums kept in registers.
///
/// Winograd's inner product multiplies two columns e and o at once: (a_e + d + w_o) (a_o + w_e) = a_e w_e + a_o w_o +
/// (a_e + d) a_o + w_e (w_o + d). The last two terms belong to the row of activations and to that of weights. Sums of
/// two codes of 4 bits fit a byte; d keeps the unsigned one from being negative. It halves the products, of which
/// processors run two per cycle beside as many or more additions.
namespace baseq {

/// Up to so many rows of codes, planes counted, codes are unpacked in registers.
constexpr int64_t kNarrowCodeRows = 8;
/// Ahead of what is read: the processor's own prefetching stops at the end of a page.
constexpr int64_t kStreamAhead = 4096;
/// d of the pairs: codes of activations are at least -15.
constexpr int kPairOffset = 15;

[[gnu::always_inline]] inline void prefetch_block(const uint8_t* block) { __builtin_prefetch(block + kStreamAhead); }

/// Register `vector` of slice kSlice of a packed chunk.
template <class Isa, int kBits, int kSlice>
[[gnu::always_inline]] inline typename Isa::Words unpacked(const uint8_t* chunk, int vector) {
  using Words = typename Isa::Words;
  Words codes = {};
  const auto add_plane = [&](auto width_of) __attribute__((always_inline)) {
    constexpr int kWidth = decltype(width_of)::value;
    if constexpr ((kBits & kWidth) != 0) {
      constexpr PlaneShift kPlane = plane_of(kBits, kWidth);
      constexpr int kInBlock = 8 / kWidth, kRight = kSlice % kInBlock * kWidth - kPlane.shift;
      constexpr uint32_t kMask = (((1U << kWidth) - 1U) << kPlane.shift) * 0x01010101U;
      const uint8_t* block = chunk + kPlane.offset + kSlice / kInBlock * kBlockBytes;
      Words bits = *reinterpret_cast<const Words*>(block + vector * int64_t{sizeof(Words)});
      if constexpr (kRight > 0) bits = bits >> kRight;
      if constexpr (kRight < 0) bits = bits << -kRight;
      if constexpr (kWidth < 8) bits = bits & kMask;
      codes = codes | bits;
    }
  };
  add_plane(std::integral_constant<int, 8>{});
  add_plane(std::integral_constant<int, 4>{});
  add_plane(std::integral_constant<int, 2>{});
  add_plane(std::integral_constant<int, 1>{});
  return codes;
}

/// Adds sums of kPlanes planes of one row of activations, the zero points subtracted, to its floats.
template <class Isa, int kPlanes>
[[gnu::always_inline]] inline void add_scaled(const typename Isa::Ints& first, const typename Isa::Ints& second,
                                              const typename Isa::Floats& scales, const float* scale,
                                              typename Isa::Floats& total) {
  using Floats = typename Isa::Floats;
  Floats value = __builtin_convertvector(first, Floats);
  if constexpr (kPlanes == 2) {
    const Floats high = value;
    value = __builtin_convertvector(second, Floats);
    Isa::fma(value, high, Floats{} + 128.0F);
  }
  Isa::fma(total, value, scales * broadcast_float<Isa>(scale));
}

/// factor_row of kRows rows, whose totals are total_stride apart.
template <class Isa, StoredType kType, int kRows>
[[gnu::always_inline]] inline void vnni_factor_rows(const FactorPanels& factors, int64_t panel, const float* values,
                                                    float* total, int64_t total_stride) {
  using Floats = typename Isa::Floats;
  const int64_t columns = factors.columns, first = panel * columns * kPanelRows;
  const auto* bytes = static_cast<const uint8_t*>(factors.values);
  for (int vector = 0; vector < kVectors<Isa>; ++vector) {
    Floats chains[kRows * 4];
    repeat<kRows * 4>([&](auto i) __attribute__((always_inline)) { chains[i] = Floats{}; });
    for (int64_t k = 0; k < columns; k += 4) {
      const int64_t at = first + k * kPanelRows + vector * Isa::kLanes;
      for (int64_t line = 0; line < bytes_of(kType); ++line) prefetch_block(bytes + at * bytes_of(kType) + 64 * line);
      repeat<4>([&](auto c) __attribute__((always_inline)) {
        const Floats column = load_stored<Isa, kType>(factors.values, at + c * kPanelRows);
        repeat<kRows>([&](auto r) __attribute__((always_inline)) {
          Isa::fma(chains[r * 4 + c], column, values + r * columns + k + c);
        });
      });
    }
    repeat<kRows>([&](auto r) __attribute__((always_inline)) {
      *reinterpret_cast<Floats*>(total + r * total_stride + vector * Isa::kLanes) =
          (chains[r * 4] + chains[r * 4 + 1]) + (chains[r * 4 + 2] + chains[r * 4 + 3]);
    });
  }
}

template <class Isa, StoredType kType>
[[gnu::always_inline]] inline void vnni_factors_of(const FactorPanels& factors, int64_t panel, const float* values,
                                                   int64_t rows, float* total, int64_t total_stride) {
  constexpr int kTogether = Isa::kLanes == 16 ? 6 : 3;
  int64_t row = 0;
  for (; row + kTogether <= rows; row += kTogether) {
    vnni_factor_rows<Isa, kType, kTogether>(factors, panel, values + row * factors.columns, total + row * total_stride,
                                            total_stride);
  }
  for (; row < rows; ++row) {
    vnni_factor_rows<Isa, kType, 1>(factors, panel, values + row * factors.columns, total + row * total_stride,
                                    total_stride);
  }
}

template <class Isa>
[[gnu::always_inline]] inline void vnni_factors(const FactorPanels& factors, int64_t panel, const float* values,
                                                int64_t rows, float* total, int64_t total_stride) {
  switch (factors.type) {
    case StoredType::kFloat:
      return vnni_factors_of<Isa, StoredType::kFloat>(factors, panel, values, rows, total, total_stride);
    case StoredType::kBFloat16:
      return vnni_factors_of<Isa, StoredType::kBFloat16>(factors, panel, values, rows, total, total_stride);
    case StoredType::kHalf:
      return vnni_factors_of<Isa, StoredType::kHalf>(factors, panel, values, rows, total, total_stride);
    case StoredType::kInt8:
      return vnni_factors_of<Isa, StoredType::kInt8>(factors, panel, values, rows, total, total_stride);
  }
}

/// Base and bias of register `vector` of row `row`, and the store of the columns that exist.
template <class Isa>
[[gnu::always_inline]] inline void finish_lanes(const WeightPanels& weights, const CodeRows& x, int64_t row,
                                                int64_t panel, int vector, typename Isa::Floats sum, float* y) {
  using Floats = typename Isa::Floats;
  const int64_t first = panel * kPanelRows + vector * Isa::kLanes, left = weights.out_features - first;
  if (x.base != nullptr) Isa::fma(sum, *reinterpret_cast<const Floats*>(weights.row_sums + first), x.base + row);
  if (weights.bias != nullptr) sum = sum + *reinterpret_cast<const Floats*>(weights.bias + first);
  float* out = y + row * weights.out_features + first;
  if (left >= Isa::kLanes) {
    *reinterpret_cast<Floats*>(out) = sum;
  } else if (left > 0) {
    std::memcpy(out, &sum, static_cast<size_t>(left) * sizeof(float));
  }
}

template <class Isa>
[[gnu::always_inline]] inline void finish_row(const WeightPanels& weights, const CodeRows& x, int64_t row,
                                              int64_t panel, const float* total, float* y) {
  repeat<kVectors<Isa>>([&](auto v) __attribute__((always_inline)) {
    const auto sum = *reinterpret_cast<const typename Isa::Floats*>(total + v * Isa::kLanes);
    finish_lanes<Isa>(weights, x, row, panel, v, sum, y);
  });
}

}  // namespace baseq
