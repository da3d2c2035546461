#pragma once

#include <bit>
#include <cstdint>
#include <utility>

#include "integer_kernels.h"

// Vectors as arguments, of functions that are all inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
// Lanes and vectors of an array are set one by one.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

/// What the kernels need of the registers of an instruction set. g++ 12 moves the sums of a tile to memory when they
/// are written with intrinsics; with inline assembly on its vector types they stay in registers. clang checks the
/// operands of assembly before it inlines, where a function has no instruction set yet: it gets the portable form.
namespace baseq {

/// Calls fn with the constants 0 to kCount - 1.
template <int kCount, class Fn>
[[gnu::always_inline]] inline void repeat(const Fn& fn) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (fn(std::integral_constant<int, i>{}), ...);
  }
  (std::make_integer_sequence<int, kCount>{});
}

using FourBytes = int32_t __attribute__((may_alias, aligned(1)));

#if defined(__x86_64__) && !defined(__clang__)
struct Avx512Registers {
  static constexpr int kLanes = 16, kRegisters = 32;
  using Floats = float __attribute__((vector_size(64), aligned(4), may_alias));
  using Ints = int32_t __attribute__((vector_size(64), aligned(4), may_alias));
  using Words = uint32_t __attribute__((vector_size(64), aligned(1), may_alias));
  using Bytes = uint8_t __attribute__((vector_size(64), aligned(1), may_alias));
  using Longs = uint64_t __attribute__((vector_size(64), aligned(1), may_alias));
  using Shorts = int16_t __attribute__((vector_size(32), aligned(2), may_alias));
  using ByteQuarters = uint8_t __attribute__((vector_size(16), aligned(1), may_alias));
  using ByteHalves = uint8_t __attribute__((vector_size(32), aligned(1), may_alias));
  /// Rows of a tile by panels of 16 columns. Pairs keep sums of codes beside those of products.
  static constexpr int kTilePanels = 2, kTileRows = 12, kGroupTileRows = 6, kTwoPlaneTileRows = 8, kPairTileRows = 8;

  /// Four unsigned bytes by four signed ones in each lane.
  [[gnu::always_inline]] static void dot(Ints& sum, const Words& weights, const Words& codes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(codes));
  }
  [[gnu::always_inline]] static void dot(Ints& sum, const Words& weights, const int8_t* codes) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weights), "m"(*reinterpret_cast<const FourBytes*>(codes)));
  }
  /// Two int16 by two int16 in each lane.
  [[gnu::always_inline]] static void dot_shorts(Ints& sum, const Words& a, const Words& b) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  }
  /// kLanes bytes, signed bytes and uint16 as 32 bits; 2 kLanes bytes as uint16; kLanes float16 as float32.
  [[gnu::always_inline]] static Words widen_bytes(const void* values) {
    Words result;
    asm("vpmovzxbd %1, %0" : "=v"(result) : "m"(*static_cast<const ByteQuarters*>(values)));
    return result;
  }
  [[gnu::always_inline]] static Ints widen_signed_bytes(const void* values) {
    Ints result;
    asm("vpmovsxbd %1, %0" : "=v"(result) : "m"(*static_cast<const ByteQuarters*>(values)));
    return result;
  }
  [[gnu::always_inline]] static Words widen_shorts(const void* values) {
    Words result;
    asm("vpmovzxwd %1, %0" : "=v"(result) : "m"(*static_cast<const ByteHalves*>(values)));
    return result;
  }
  [[gnu::always_inline]] static Words widen_pairs(const void* values) {
    Words result;
    asm("vpmovzxbw %1, %0" : "=v"(result) : "m"(*static_cast<const ByteHalves*>(values)));
    return result;
  }
  [[gnu::always_inline]] static Floats widen_halves(const void* values) {
    Floats result;
    asm("vcvtph2ps %1, %0" : "=v"(result) : "m"(*static_cast<const ByteHalves*>(values)));
    return result;
  }
  [[gnu::always_inline]] static Words broadcast(const void* four) {
    Words result;
    asm("vpbroadcastd %1, %0" : "=v"(result) : "m"(*static_cast<const FourBytes*>(four)));
    return result;
  }
  [[gnu::always_inline]] static void fma(Floats& total, const Floats& a, const Floats& b) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(total) : "v"(a), "v"(b));
  }
  [[gnu::always_inline]] static void fma(Floats& total, const Floats& a, const float* b) {
    asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(total) : "v"(a), "m"(*b));
  }
};

struct Avx2Registers {
  static constexpr int kLanes = 8, kRegisters = 16;
  using Floats = float __attribute__((vector_size(32), aligned(4), may_alias));
  using Ints = int32_t __attribute__((vector_size(32), aligned(4), may_alias));
  using Words = uint32_t __attribute__((vector_size(32), aligned(1), may_alias));
  using Bytes = uint8_t __attribute__((vector_size(32), aligned(1), may_alias));
  using Longs = uint64_t __attribute__((vector_size(32), aligned(1), may_alias));
  using Shorts = int16_t __attribute__((vector_size(16), aligned(2), may_alias));
  using ByteQuarters = uint8_t __attribute__((vector_size(8), aligned(1), may_alias));
  using ByteHalves = uint8_t __attribute__((vector_size(16), aligned(1), may_alias));

  [[gnu::always_inline]] static void dot_shorts(Ints& sum, const Words& a, const Words& b) {
    Ints products;
    asm("vpmaddwd %2, %1, %0" : "=x"(products) : "x"(a), "x"(b));
    sum = sum + products;
  }
  /// kLanes bytes, signed bytes and uint16 as 32 bits; 2 kLanes bytes as uint16; kLanes float16 as float32.
  [[gnu::always_inline]] static Words widen_bytes(const void* values) {
    Words result;
    asm("vpmovzxbd %1, %0" : "=x"(result) : "m"(*static_cast<const ByteQuarters*>(values)));
    return result;
  }
  [[gnu::always_inline]] static Ints widen_signed_bytes(const void* values) {
    Ints result;
    asm("vpmovsxbd %1, %0" : "=x"(result) : "m"(*static_cast<const ByteQuarters*>(values)));
    return result;
  }
  [[gnu::always_inline]] static Words widen_shorts(const void* values) {
    Words result;
    asm("vpmovzxwd %1, %0" : "=x"(result) : "m"(*static_cast<const ByteHalves*>(values)));
    return result;
  }
  [[gnu::always_inline]] static Words widen_pairs(const void* values) {
    Words result;
    asm("vpmovzxbw %1, %0" : "=x"(result) : "m"(*static_cast<const ByteHalves*>(values)));
    return result;
  }
  [[gnu::always_inline]] static Floats widen_halves(const void* values) {
    Floats result;
    asm("vcvtph2ps %1, %0" : "=x"(result) : "m"(*static_cast<const ByteHalves*>(values)));
    return result;
  }
  [[gnu::always_inline]] static Words broadcast(const void* four) {
    Words result;
    asm("vpbroadcastd %1, %0" : "=x"(result) : "m"(*static_cast<const FourBytes*>(four)));
    return result;
  }
  [[gnu::always_inline]] static void fma(Floats& total, const Floats& a, const Floats& b) {
    asm("vfmadd231ps %2, %1, %0" : "+x"(total) : "x"(a), "x"(b));
  }
  [[gnu::always_inline]] static void fma(Floats& total, const Floats& a, const float* b) {
    fma(total, a, reinterpret_cast<Floats>(broadcast(b)));
  }
};

struct AvxVnniRegisters : Avx2Registers {
  static constexpr int kTilePanels = 1, kTileRows = 6, kGroupTileRows = 6, kTwoPlaneTileRows = 4, kPairTileRows = 4;

  [[gnu::always_inline]] static void dot(Ints& sum, const Words& weights, const Words& codes) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(weights), "x"(codes));
  }
  [[gnu::always_inline]] static void dot(Ints& sum, const Words& weights, const int8_t* codes) {
    dot(sum, weights, broadcast(codes));
  }
};
#endif

/// What every processor of an architecture has: 128 bits.
struct PortableRegisters {
  static constexpr int kLanes = 4, kRegisters = 16;
  using Floats = float __attribute__((vector_size(16), aligned(4), may_alias));
  using Ints = int32_t __attribute__((vector_size(16), aligned(4), may_alias));
  using Words = uint32_t __attribute__((vector_size(16), aligned(1), may_alias));
  using Shorts = int16_t __attribute__((vector_size(8), aligned(2), may_alias));
  using ByteQuarters = uint8_t __attribute__((vector_size(4), aligned(1), may_alias));
  using ByteHalves = uint8_t __attribute__((vector_size(8), aligned(1), may_alias));

  [[gnu::always_inline]] static void dot_shorts(Ints& sum, const Words& a, const Words& b) {
    const auto left = reinterpret_cast<Ints>(a), right = reinterpret_cast<Ints>(b);
    sum = sum + (left << 16 >> 16) * (right << 16 >> 16) + (left >> 16) * (right >> 16);
  }
  [[gnu::always_inline]] static Words widen_bytes(const void* values) {
    const auto* bytes = static_cast<const uint8_t*>(values);
    return Words{bytes[0], bytes[1], bytes[2], bytes[3]};
  }
  [[gnu::always_inline]] static Ints widen_signed_bytes(const void* values) {
    const auto* bytes = static_cast<const int8_t*>(values);
    return Ints{bytes[0], bytes[1], bytes[2], bytes[3]};
  }
  [[gnu::always_inline]] static Words widen_shorts(const void* values) {
    const auto* shorts = static_cast<const ByteHalves*>(values);
    const auto at = [&](int i) { return static_cast<uint32_t>((*shorts)[2 * i] | (*shorts)[2 * i + 1] << 8); };
    return Words{at(0), at(1), at(2), at(3)};
  }
  [[gnu::always_inline]] static Words widen_pairs(const void* values) {
    const auto* bytes = static_cast<const uint8_t*>(values);
    const auto pair = [&](int i) { return bytes[2 * i] | static_cast<uint32_t>(bytes[2 * i + 1]) << 16; };
    return Words{pair(0), pair(1), pair(2), pair(3)};
  }
  /// float16, infinities and NaN too.
  [[gnu::always_inline]] static Floats widen_halves(const void* values) {
    const Words bits = widen_shorts(values);
    const Floats magnitude = reinterpret_cast<Floats>((bits & 0x7fffU) << 13) * 0x1p112F;
    // One where all bits of the exponent are set, and with it those of a float's exponent.
    const Words special = ((bits & 0x7c00U) + 0x0400U) >> 15;
    const Words exponent = (Words{} - (special & 1U)) & 0x7f800000U;
    return reinterpret_cast<Floats>(reinterpret_cast<Words>(magnitude) | (bits & 0x8000U) << 16 | exponent);
  }
  [[gnu::always_inline]] static Words broadcast(const void* four) {
    return Words{} + static_cast<uint32_t>(*static_cast<const FourBytes*>(four));
  }
  [[gnu::always_inline]] static void fma(Floats& total, const Floats& a, const Floats& b) {
    for (int i = 0; i < kLanes; ++i) total[i] = __builtin_fmaf(a[i], b[i], total[i]);
  }
  [[gnu::always_inline]] static void fma(Floats& total, const Floats& a, const float* b) {
    fma(total, a, Floats{} + *b);
  }
};

/// Registers of 16 lanes.
template <class Isa>
constexpr int kVectors = static_cast<int>(kPanelRows) / Isa::kLanes;

template <class Isa>
[[gnu::always_inline]] inline typename Isa::Floats broadcast_float(const float* value) {
  return reinterpret_cast<typename Isa::Floats>(Isa::broadcast(value));
}

/// kLanes stored values from i on.
template <class Isa, StoredType kType>
[[gnu::always_inline]] inline typename Isa::Floats load_stored(const void* values, int64_t i) {
  using Floats = typename Isa::Floats;
  using Words = typename Isa::Words;
  if constexpr (kType == StoredType::kFloat) {
    return *reinterpret_cast<const Floats*>(static_cast<const float*>(values) + i);
  } else if constexpr (kType == StoredType::kInt8) {
    return __builtin_convertvector(Isa::widen_signed_bytes(static_cast<const int8_t*>(values) + i), Floats);
  } else {
    const Words bits = Isa::widen_shorts(static_cast<const uint16_t*>(values) + i);
    if constexpr (kType == StoredType::kBFloat16) return reinterpret_cast<Floats>(bits << 16);
    // The product is exact, for denormal numbers too.
    const Floats magnitude = reinterpret_cast<Floats>((bits & 0x7fffU) << 13) * 0x1p112F;
    return reinterpret_cast<Floats>(reinterpret_cast<Words>(magnitude) | (bits & 0x8000U) << 16);
  }
}

template <class Isa>
[[gnu::always_inline]] inline typename Isa::Floats load_scales(StoredType type, const void* values, int64_t i) {
  if (type == StoredType::kBFloat16) return load_stored<Isa, StoredType::kBFloat16>(values, i);
  if (type == StoredType::kFloat) return load_stored<Isa, StoredType::kFloat>(values, i);
  return load_stored<Isa, StoredType::kHalf>(values, i);
}

}  // namespace baseq
