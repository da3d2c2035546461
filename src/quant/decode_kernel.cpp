#include "decode_kernel.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <type_traits>
#include <utility>

#include "vectors.h"

namespace baseq {
namespace {

// Prefetched are, for the processor itself stops at the end of a page: of rows side by side what follows in the next
// ones, of a single row what follows this many words ahead; factors at most as far ahead as this.
constexpr int64_t kWordsAhead = 2048, kFactorsAhead = 1024;

[[gnu::always_inline]] inline float value_of(uint16_t factor) { return from_bfloat16(factor); }
[[gnu::always_inline]] inline float value_of(int8_t factor) { return factor; }

/// Factor k of each word.
template <int kLanes, class Factor, int k>
[[gnu::always_inline]] inline Floats<kLanes> factor(const Words<kLanes>& words) {
  if constexpr (std::is_same_v<Factor, int8_t>) {
    using Ints = typename Vectors<kLanes>::Ints;
    return __builtin_convertvector(reinterpret_cast<Ints>(words << (24 - 8 * k)) >> 24, Floats<kLanes>);
  } else {
    return reinterpret_cast<Floats<kLanes>>(k == 0 ? words << 16 : words & 0xffff0000U);
  }
}

/// Whole steps of the products below; returns how many factors they took.
template <int kLanes, int kRows, class Factor, int... k>
[[gnu::always_inline]] inline int64_t add_steps(const Factor* a, int64_t stride, const float* x, int64_t n,
                                                Floats<kLanes> (&sums)[kRows], std::integer_sequence<int, k...>) {
  constexpr int64_t kStep = sizeof...(k) * kLanes;
  Floats<kLanes> parts[sizeof...(k)][kRows] = {};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    Words<kLanes> words[kRows];
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const Factor* factors = a + row * stride + i;
      __builtin_prefetch(factors + std::min(kFactorsAhead, kRows * stride));
      words[row] = *reinterpret_cast<const volatile typename Vectors<kLanes>::Unaligned*>(factors);
    }
    const auto multiply = [&]<int kFactor>(std::integral_constant<int, kFactor>) __attribute__((always_inline)) {
      const Floats<kLanes> values = load<kLanes>(x + i + kFactor * kLanes);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        parts[kFactor][row] += factor<kLanes, Factor, kFactor>(words[row]) * values;
      }
    };
    (multiply(std::integral_constant<int, k>{}), ...);
  }
  for (int row = 0; row < kRows; ++row) sums[row] += (parts[k][row] + ...);
  return i;
}

/// The products of `n` factors in each of kRows rows that are `stride` apart with x in factor_order, added to sums.
template <int kLanes, int kRows, class Factor>
[[gnu::always_inline]] inline void add_products(const Factor* a, int64_t stride, const float* x, int64_t n,
                                                Floats<kLanes> (&sums)[kRows]) {
  constexpr auto kInWord = std::make_integer_sequence<int, 4 / sizeof(Factor)>{};
  int64_t i = add_steps<kLanes>(a, stride, x, n, sums, kInWord);
  if (i == n) return;
  if constexpr (kLanes > kNarrowestLanes) {
    Floats<kLanes / 2> narrow[kRows] = {};
    add_products<kLanes / 2>(a + i, stride, x + i, n - i, narrow);
    for (int row = 0; row < kRows; ++row) {
      sums[row] += widened<kLanes>(narrow[row], std::make_integer_sequence<int, kLanes>{});
    }
  } else {
    for (; i < n; ++i) {
      for (int row = 0; row < kRows; ++row) sums[row][0] += value_of(a[row * stride + i]) * x[i];
    }
  }
}

/// The products of rows `row` and following of the factors `a` [.., n].
template <int kLanes, int kRows>
[[gnu::always_inline]] inline void add_products(FactorType type, const void* a, int64_t row, const float* x, int64_t n,
                                                Floats<kLanes> (&sums)[kRows]) {
  if (type == FactorType::kInt8) {
    add_products<kLanes>(static_cast<const int8_t*>(a) + row * n, n, x, n, sums);
  } else {
    add_products<kLanes>(static_cast<const uint16_t*>(a) + row * n, n, x, n, sums);
  }
}

template <int kLanes, int kBits>
struct Layout {
  static constexpr int kCodes = static_cast<int>(codes_per_lane(kBits));
  static constexpr int kLaneBits = kBits * kCodes;
  static constexpr int kWords = kLaneBits * kLanes / 32;  // of a block; at most kLanes
  static constexpr int word(int lane) { return kLaneBits * lane / 32; }
  static constexpr int next_word(int lane) { return word(lane) + 1 < kWords ? word(lane) + 1 : word(lane); }
  static constexpr uint32_t shift(int lane) { return kLaneBits * lane % 32; }
  // By 31 where the lane begins with its word: what comes in lies above the lane's bits.
  static constexpr uint32_t next_shift(int lane) { return shift(lane) == 0 ? 31 : 32 - shift(lane); }
};

/// The block's codes, those of each lane in its low bits.
template <int kLanes, int kBits, int... kLane>
[[gnu::always_inline]] inline Words<kLanes> read_block(const uint32_t* packed, std::integer_sequence<int, kLane...>) {
  using L = Layout<kLanes, kBits>;
  // Volatile: once into a register, not once for each code.
  const Words<kLanes> block = *reinterpret_cast<const volatile Words<kLanes>*>(packed);
  if constexpr (L::kLaneBits == 32) {
    return block;
  } else {
    constexpr Words<kLanes> kShift = {L::shift(kLane)...}, kNextShift = {L::next_shift(kLane)...};
    const Words<kLanes> low = __builtin_shufflevector(block, block, L::word(kLane)...) >> kShift;
    if constexpr (32 % L::kLaneBits == 0) return low;
    return low | (__builtin_shufflevector(block, block, L::next_word(kLane)...) << kNextShift);
  }
}

/// Code k of every lane as the float 2^b + code: its bits are the highest of the mantissa.
template <int kLanes, int kBits, int k>
[[gnu::always_inline]] inline Floats<kLanes> code(const Words<kLanes>& words) {
  constexpr int kShift = 23 - kBits - kBits * k;
  constexpr uint32_t kMask = ((1U << kBits) - 1) << (23 - kBits), kExponent = (127U + kBits) << 23;
  Words<kLanes> bits;
  if constexpr (kShift >= 0) {
    bits = words << kShift;
  } else {
    bits = words >> -kShift;
  }
  bits = (bits & kMask) | kExponent;
  return reinterpret_cast<Floats<kLanes>>(bits);
}

/// The lanes of a block, whose kPerBlock scales stand at `scale`.
template <int kLanes, int kPerBlock, int... lane>
[[gnu::always_inline]] inline Floats<kLanes> spread(const float* scale, std::integer_sequence<int, lane...>) {
  const Floats<kLanes> scales = load<kLanes>(scale);
  if constexpr (kPerBlock == kLanes) return scales;
  return __builtin_shufflevector(scales, scales, (lane * kPerBlock / kLanes)...);
}

/// `count` blocks of each of kRows rows, which are `words` apart and whose scales are `scales_of_row` apart, added to
/// the sums.
template <int kLanes, int kBits, int kPerBlock, int kRows, int... k>
[[gnu::always_inline]] inline void add_blocks(const uint32_t* packed, int64_t words, const float* scale,
                                              int64_t scales_of_row, const float* x, const float* x_start,
                                              int64_t count, Floats<kLanes> (&sums)[kRows],
                                              std::integer_sequence<int, k...>) {
  using L = Layout<kLanes, kBits>;
  constexpr auto kAllLanes = std::make_integer_sequence<int, kLanes>{};
  for (int64_t block = 0; block < count; ++block) {
    Words<kLanes> codes[kRows];
    Floats<kLanes> dots[kRows];
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const uint32_t* first = packed + row * words + block * L::kWords;
      __builtin_prefetch(first + (kRows == 1 ? kWordsAhead : kRows * words));
      codes[row] = read_block<kLanes, kBits>(first, kAllLanes);
      dots[row] = load<kLanes>(x_start + block * kLanes);
    }
    const auto multiply = [&]<int kCode>(std::integral_constant<int, kCode>) __attribute__((always_inline)) {
      const Floats<kLanes> values = load<kLanes>(x + (block * L::kCodes + kCode) * kLanes);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) dots[row] += code<kLanes, kBits, kCode>(codes[row]) * values;
    };
    (multiply(std::integral_constant<int, k>{}), ...);
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      sums[row] += spread<kLanes, kPerBlock>(scale + row * scales_of_row + block * kPerBlock, kAllLanes) * dots[row];
    }
  }
}

/// The scales of a row as float32: those in memory or a copy in `buffer` [groups].
[[gnu::always_inline]] inline const float* read_scales(const DecodeRows& rows, int64_t row, float* buffer) {
  const int64_t first = rows.one_scale ? 0 : row * rows.groups;
  if (rows.scale_type == ScaleType::kFloat) return static_cast<const float*>(rows.scale) + first;
  const uint16_t* stored = static_cast<const uint16_t*>(rows.scale) + first;
  if (rows.scale_type == ScaleType::kBFloat16) {
    for (int64_t g = 0; g < rows.groups; ++g) buffer[g] = from_bfloat16(stored[g]);
  } else {
    for (int64_t g = 0; g < rows.groups; ++g) buffer[g] = from_half(stored[g]);
  }
  return buffer;
}

/// What the zero points take away: sum over groups of scale * zero point * sum of x.
template <int kLanes>
[[gnu::always_inline]] inline float zero_point_part(const DecodeRows& rows, int64_t row, const float* scale) {
  const int64_t bit = rows.one_scale ? 0 : row * rows.num_bits, groups = rows.groups;
  const auto shift = static_cast<uint32_t>(bit % 32);
  const uint32_t* low = rows.zero_point + bit / 32 * groups;
  const bool crosses = shift + rows.num_bits > 32;
  const uint32_t* high = crosses ? low + groups : low;
  const uint32_t high_shift = crosses ? 32 - shift : 0, high_mask = crosses ? ~0U : 0U;
  const auto mask = static_cast<uint32_t>((int64_t{1} << rows.num_bits) - 1);
  const auto offset = static_cast<int32_t>(int64_t{1} << (rows.num_bits - 1));
  Floats<kLanes> sums{};
  int64_t g = 0;
  for (; g + kLanes <= groups; g += kLanes) {
    using W = Words<kLanes>;
    const W bits = (*reinterpret_cast<const W*>(low + g) >> shift) |
                   ((*reinterpret_cast<const W*>(high + g) & high_mask) << high_shift);
    const auto zero_point = reinterpret_cast<typename Vectors<kLanes>::Ints>(bits & mask) - offset;
    sums += load<kLanes>(scale + g) * load<kLanes>(rows.group_sums + g) *
            __builtin_convertvector(zero_point, Floats<kLanes>);
  }
  float total = sum<kLanes>(sums);
  for (; g < groups; ++g) {
    const uint32_t bits = (low[g] >> shift) | ((high[g] & high_mask) << high_shift);
    total += scale[g] * rows.group_sums[g] * static_cast<float>(static_cast<int32_t>(bits & mask) - offset);
  }
  return total;
}

/// Scales that a block of kLanes lanes needs: one for all, one for each half, or else one for each lane.
template <int kLanes>
[[gnu::always_inline]] inline int64_t scales_per_block(const DecodeRows& rows) {
  if (rows.lanes_per_group % kLanes == 0) return 1;
  return rows.lanes_per_group * 2 == kLanes ? 2 : kLanes;
}

/// Each scale as often as the blocks need it.
[[gnu::always_inline]] inline void repeat_scales(const float* scale, int64_t groups, int64_t times, float* out) {
  if (times == 1) {
    std::copy_n(scale, groups, out);
    return;
  }
  for (int64_t g = 0; g < groups; ++g) {
    if (times == 4) {  // of a known length: groups of 32
      for (int64_t i = 0; i < 4; ++i) out[g * 4 + i] = scale[g];
    } else {
      std::fill_n(out + g * times, times, scale[g]);
    }
  }
}

/// The dot products of rows `row` and following, added to `sums`.
/// @param scale [kRows, scales_of_row], kPerBlock a block
template <int kLanes, int kBits, int kPerBlock, int kRows>
[[gnu::always_inline]] inline void multiply(const DecodeRows& rows, int64_t row, const float* scale,
                                            int64_t scales_of_row, Floats<kLanes> (&sums)[kRows]) {
  using L = Layout<kLanes, kBits>;
  constexpr auto kCodes = std::make_integer_sequence<int, L::kCodes>{};
  // Blocks are read as whole vectors; those that would end behind the tensor from a copy.
  const uint32_t* packed = rows.packed + row * rows.words;
  const int64_t readable = rows.packed_end - packed - (kRows - 1) * rows.words - kLanes;
  const int64_t direct = readable < 0 ? 0 : std::min(rows.blocks, readable / L::kWords + 1);
  uint32_t copy[kRows * kLanes] = {};
  for (int64_t block = 0, count = 0; block < rows.blocks; block += count) {
    count = std::max<int64_t>(direct - block, 1);
    const uint32_t* first = packed + block * L::kWords;
    int64_t words = rows.words;
    if (block >= direct) {
      for (int r = 0; r < kRows; ++r, first += rows.words) {
        std::memcpy(copy + r * kLanes, first, std::min<int64_t>(rows.packed_end - first, L::kWords) * sizeof(uint32_t));
      }
      first = copy;
      words = kLanes;
    }
    add_blocks<kLanes, kBits, kPerBlock>(first, words, scale + block * kPerBlock, scales_of_row,
                                         rows.x + block * kLanes * L::kCodes, rows.x_start + block * kLanes, count,
                                         sums, kCodes);
  }
}

template <int kLanes, int kPerBlock, int kRows>
[[gnu::always_inline]] inline void multiply_any(const DecodeRows& rows, int64_t row, const float* scale,
                                                int64_t scales_of_row, Floats<kLanes> (&sums)[kRows]) {
  switch (rows.num_bits) {
    case 2:
      return multiply<kLanes, 2, kPerBlock>(rows, row, scale, scales_of_row, sums);
    case 3:
      return multiply<kLanes, 3, kPerBlock>(rows, row, scale, scales_of_row, sums);
    case 4:
      return multiply<kLanes, 4, kPerBlock>(rows, row, scale, scales_of_row, sums);
    case 5:
      return multiply<kLanes, 5, kPerBlock>(rows, row, scale, scales_of_row, sums);
    case 6:
      return multiply<kLanes, 6, kPerBlock>(rows, row, scale, scales_of_row, sums);
    case 7:
      return multiply<kLanes, 7, kPerBlock>(rows, row, scale, scales_of_row, sums);
    default:
      return multiply<kLanes, 8, kPerBlock>(rows, row, scale, scales_of_row, sums);
  }
}

/// y of rows `row` to `row + kRows`; scales of a block are per_block, which is kLanes for a single row.
template <int kLanes, int kRows>
[[gnu::always_inline]] inline void decode_together(const DecodeRows& rows, int64_t row, int64_t per_block,
                                                   float* scratch) {
  float* scales = scratch + rows.groups;
  // Behind them as many as a vector reads beyond the last.
  const int64_t scales_of_row = rows.blocks * per_block + kLanes;
  Floats<kLanes> sums[kRows] = {};
  add_products<kLanes>(rows.factor_type, rows.lora_b, row, rows.t, rows.rank, sums);
  for (int r = 0; r < kRows; ++r) {
    const float* scale = read_scales(rows, row + r, scratch);
    repeat_scales(scale, rows.groups, rows.lanes_per_group * per_block / kLanes, scales + r * scales_of_row);
    if (rows.bias != nullptr) sums[r][0] += rows.bias[row + r];
    if (rows.zero_point != nullptr) sums[r][0] -= zero_point_part<kLanes>(rows, row + r, scale);
  }
  if (kRows == 1 || per_block == kLanes) {
    multiply_any<kLanes, kLanes>(rows, row, scales, scales_of_row, sums);
  } else if (per_block == 2) {
    if constexpr (kRows > 1) multiply_any<kLanes, 2>(rows, row, scales, scales_of_row, sums);
  } else {
    if constexpr (kRows > 1) multiply_any<kLanes, 1>(rows, row, scales, scales_of_row, sums);
  }
  for (int r = 0; r < kRows; ++r) rows.y[row + r] = sum<kLanes>(sums[r]);
}

template <int kLanes>
[[gnu::always_inline]] inline void decode(const DecodeRows& rows, int64_t begin, int64_t end, float* scratch) {
  constexpr int kRows = static_cast<int>(rows_together(kLanes));
  const int64_t per_block = scales_per_block<kLanes>(rows);
  // Lanes behind the last column have a scale as well, which has to be a number.
  std::fill_n(scratch, rows.groups + kRows * (rows.blocks + 1) * kLanes, 0.0F);
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) decode_together<kLanes, kRows>(rows, row, per_block, scratch);
  for (; row < end; ++row) decode_together<kLanes, 1>(rows, row, kLanes, scratch);
}

template <int kLanes>
[[gnu::always_inline]] inline void project(FactorType type, const void* a, const float* x, int64_t columns,
                                           int64_t begin, int64_t end, float* out) {
  const auto rows_of = [&]<int kRows>(int64_t row, std::integral_constant<int, kRows>) __attribute__((always_inline)) {
    Floats<kLanes> sums[kRows] = {};
    add_products<kLanes>(type, a, row, x, columns, sums);
    for (int r = 0; r < kRows; ++r) out[row + r] = sum<kLanes>(sums[r]);
  };
  constexpr int kRows = static_cast<int>(rows_together(kLanes));
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) rows_of(row, std::integral_constant<int, kRows>{});
  for (; row < end; ++row) rows_of(row, std::integral_constant<int, 1>{});
}

#if defined(__x86_64__)
__attribute__((target("avx512f"))) void decode_avx512(const DecodeRows& rows, int64_t begin, int64_t end,
                                                      float* scratch) {
  decode<16>(rows, begin, end, scratch);
}
__attribute__((target("avx512f"))) void project_avx512(FactorType type, const void* a, const float* x, int64_t columns,
                                                       int64_t begin, int64_t end, float* out) {
  project<16>(type, a, x, columns, begin, end, out);
}
__attribute__((target("avx2,fma"))) void decode_avx2(const DecodeRows& rows, int64_t begin, int64_t end,
                                                     float* scratch) {
  decode<8>(rows, begin, end, scratch);
}
__attribute__((target("avx2,fma"))) void project_avx2(FactorType type, const void* a, const float* x, int64_t columns,
                                                      int64_t begin, int64_t end, float* out) {
  project<8>(type, a, x, columns, begin, end, out);
}
#endif
void decode_baseline(const DecodeRows& rows, int64_t begin, int64_t end, float* scratch) {
  decode<8>(rows, begin, end, scratch);
}
void project_baseline(FactorType type, const void* a, const float* x, int64_t columns, int64_t begin, int64_t end,
                      float* out) {
  project<8>(type, a, x, columns, begin, end, out);
}

}  // namespace

void factor_order(FactorType type, const float* x, int64_t n, int64_t lanes, float* out) {
  const int64_t in_word = factors_in_word(type);
  int64_t i = 0;
  for (; lanes >= kNarrowestLanes; lanes /= 2) {
    for (; i + in_word * lanes <= n; i += in_word * lanes) {
      for (int64_t k = 0; k < in_word; ++k) {
        for (int64_t lane = 0; lane < lanes; ++lane) out[i + k * lanes + lane] = x[i + lane * in_word + k];
      }
    }
  }
  std::copy(x + i, x + n, out + i);
}

const DecodeKernels kDecodeKernels[] = {
#if defined(__x86_64__)
    {"avx512", 16, [] { return __builtin_cpu_supports("avx512f") != 0; }, decode_avx512, project_avx512},
    {"avx2", 8, [] { return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0; }, decode_avx2,
     project_avx2},
#endif
    {"baseline", 8, [] { return true; }, decode_baseline, project_baseline}};
const int64_t kNumDecodeKernels = std::size(kDecodeKernels);

const DecodeKernels& decode_kernels() {
  static const DecodeKernels& best =
      *std::find_if(kDecodeKernels, kDecodeKernels + kNumDecodeKernels, [](const auto& k) { return k.supported(); });
  return best;
}

}  // namespace baseq
