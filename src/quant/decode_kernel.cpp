#include "decode_kernel.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <iterator>
#include <utility>

// Vectors as arguments, of functions that are all inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace baseq {
namespace {

/// kLanes values side by side: as many as a register of the instruction set holds. All functions on them are inlined
/// into the versions for each instruction set at the end.
template <int kLanes>
struct Vectors;
template <>
struct Vectors<16> {
  using Floats = float __attribute__((vector_size(64), aligned(4), may_alias));
  using Ints = int32_t __attribute__((vector_size(64), aligned(4), may_alias));
  using Words = uint32_t __attribute__((vector_size(64), aligned(4), may_alias));
  using Pairs = uint32_t __attribute__((vector_size(64), aligned(2), may_alias));  // of bfloat16 numbers
};
template <>
struct Vectors<8> {
  using Floats = float __attribute__((vector_size(32), aligned(4), may_alias));
  using Ints = int32_t __attribute__((vector_size(32), aligned(4), may_alias));
  using Words = uint32_t __attribute__((vector_size(32), aligned(4), may_alias));
  using Pairs = uint32_t __attribute__((vector_size(32), aligned(2), may_alias));  // of bfloat16 numbers
};
template <int kLanes>
using Floats = typename Vectors<kLanes>::Floats;
template <int kLanes>
using Words = typename Vectors<kLanes>::Words;

constexpr int64_t kPrefetch = 2048;  // words ahead; the processor itself stops at the end of a page

template <int kLanes>
[[gnu::always_inline]] inline Floats<kLanes> load(const float* values) {
  return *reinterpret_cast<const Floats<kLanes>*>(values);
}

template <int kLanes>
[[gnu::always_inline]] inline float sum(const Floats<kLanes>& lanes) {
  float total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
  return total;
}

[[gnu::always_inline]] inline float from_bfloat16(uint16_t value) {
  return std::bit_cast<float>(uint32_t{value} << 16);
}

/// The sums of products of `n` bfloat16 numbers in each of kRows rows of `a` [.., n] with as many float32 ones in the
/// order of pair_up.
template <int kLanes, int kRows>
[[gnu::always_inline]] inline void dot_bfloat16(const uint16_t* a, const float* paired, int64_t n,
                                                float (&dots)[kRows]) {
  using F = Floats<kLanes>;
  using Pairs = typename Vectors<kLanes>::Pairs;
  constexpr int64_t kStep = 2 * kLanes;
  F even[kRows] = {}, odd[kRows] = {};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    const F first = load<kLanes>(paired + i), second = load<kLanes>(paired + i + kLanes);
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const uint16_t* at = a + row * n + i;
      __builtin_prefetch(at + (kRows == 1 ? kPrefetch : kRows * n));
      const Words<kLanes> pairs = *reinterpret_cast<const volatile Pairs*>(at);
      even[row] += reinterpret_cast<F>(pairs << 16) * first;
      odd[row] += reinterpret_cast<F>(pairs & 0xffff0000U) * second;
    }
  }
  for (int row = 0; row < kRows; ++row) {
    dots[row] = sum<kLanes>(even[row] + odd[row]);
    for (int64_t rest = i; rest < n; ++rest) dots[row] += from_bfloat16(a[row * n + rest]) * paired[rest];
  }
}

/// Denormal numbers included; infinities become 65536 and more.
[[gnu::always_inline]] inline float from_half(uint16_t value) {
  constexpr float kTwoTo112 = 5.192296858534828e33F;
  const float magnitude = std::bit_cast<float>((value & 0x7fffU) << 13) * kTwoTo112;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | ((value & 0x8000U) << 16));
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

/// `count` blocks of each of kRows rows that are `words` apart, whose lanes have the scales `scale` [kRows, lanes of a
/// row], added to the sums.
template <int kLanes, int kBits, int kRows, int... k>
[[gnu::always_inline]] inline void add_blocks(const uint32_t* packed, int64_t words, const float* scale,
                                              int64_t lanes_of_row, const float* x, const float* x_start, int64_t count,
                                              Floats<kLanes> (&sums)[kRows], std::integer_sequence<int, k...>) {
  using L = Layout<kLanes, kBits>;
  for (int64_t block = 0; block < count; ++block) {
    Words<kLanes> codes[kRows];
    Floats<kLanes> dots[kRows];
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const uint32_t* first = packed + row * words + block * L::kWords;
      __builtin_prefetch(first + (kRows == 1 ? kPrefetch : kRows * words));
      codes[row] = read_block<kLanes, kBits>(first, std::make_integer_sequence<int, kLanes>{});
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
      sums[row] += load<kLanes>(scale + row * lanes_of_row + block * kLanes) * dots[row];
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

template <int64_t kWidth>
[[gnu::always_inline]] inline void repeat(const float* values, int64_t count, float* out) {
  for (int64_t g = 0; g < count; ++g) {
    const float value = values[g];
    for (int64_t i = 0; i < kWidth; ++i) out[g * kWidth + i] = value;
  }
}

/// Each group's scale to all its lanes.
[[gnu::always_inline]] inline void spread_scales(const DecodeRows& rows, const float* scale, float* lanes) {
  switch (rows.lanes_per_group) {
    case 4:
      return repeat<4>(scale, rows.groups, lanes);
    case 8:
      return repeat<8>(scale, rows.groups, lanes);
    case 16:
      return repeat<16>(scale, rows.groups, lanes);
    default:
      for (int64_t g = 0; g < rows.groups; ++g) {
        std::fill_n(lanes + g * rows.lanes_per_group, rows.lanes_per_group, scale[g]);
      }
  }
}

/// What a row's sum starts with beside B t: bias and zero points.
template <int kLanes>
[[gnu::always_inline]] inline float start_of_row(const DecodeRows& rows, int64_t row, const float* scales) {
  float start = 0;
  if (rows.bias != nullptr) start += rows.bias[row];
  if (rows.zero_point != nullptr) start -= zero_point_part<kLanes>(rows, row, scales);
  return start;
}

/// The dot products of rows `row` and following, whose lanes have the scales `scale` [kRows, blocks, lanes], added to
/// `sums`.
template <int kLanes, int kBits, int kRows>
[[gnu::always_inline]] inline void multiply(const DecodeRows& rows, int64_t row, const float* scale,
                                            Floats<kLanes> (&sums)[kRows]) {
  using L = Layout<kLanes, kBits>;
  constexpr auto kCodes = std::make_integer_sequence<int, L::kCodes>{};
  // Blocks are read as whole vectors; those that would end behind the tensor from a copy.
  const uint32_t* packed = rows.packed + row * rows.words;
  const int64_t readable = rows.packed_end - packed - (kRows - 1) * rows.words - kLanes;
  const int64_t direct = readable < 0 ? 0 : std::min(rows.blocks, readable / L::kWords + 1);
  const int64_t lanes_of_row = rows.blocks * kLanes;
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
    add_blocks<kLanes, kBits>(first, words, scale + block * kLanes, lanes_of_row, rows.x + block * kLanes * L::kCodes,
                              rows.x_start + block * kLanes, count, sums, kCodes);
  }
}

template <int kLanes, int kRows>
[[gnu::always_inline]] inline void multiply_any(const DecodeRows& rows, int64_t row, const float* scale,
                                                Floats<kLanes> (&sums)[kRows]) {
  switch (rows.num_bits) {
    case 2:
      return multiply<kLanes, 2>(rows, row, scale, sums);
    case 3:
      return multiply<kLanes, 3>(rows, row, scale, sums);
    case 4:
      return multiply<kLanes, 4>(rows, row, scale, sums);
    case 5:
      return multiply<kLanes, 5>(rows, row, scale, sums);
    case 6:
      return multiply<kLanes, 6>(rows, row, scale, sums);
    case 7:
      return multiply<kLanes, 7>(rows, row, scale, sums);
    default:
      return multiply<kLanes, 8>(rows, row, scale, sums);
  }
}

/// y of rows `row` to `row + kRows`.
template <int kLanes, int kRows>
[[gnu::always_inline]] inline void decode_together(const DecodeRows& rows, int64_t row, float* scratch) {
  float* lanes = scratch + rows.groups;
  Floats<kLanes> sums[kRows] = {};
  float starts[kRows];
  dot_bfloat16<kFactorLanes>(rows.lora_b + row * rows.rank, rows.t, rows.rank, starts);
  for (int r = 0; r < kRows; ++r) {
    const float* scale = read_scales(rows, row + r, scratch);
    spread_scales(rows, scale, lanes + r * rows.blocks * kLanes);
    starts[r] += start_of_row<kLanes>(rows, row + r, scale);
  }
  multiply_any<kLanes>(rows, row, lanes, sums);
  for (int r = 0; r < kRows; ++r) rows.y[row + r] = starts[r] + sum<kLanes>(sums[r]);
}

template <int kLanes>
[[gnu::always_inline]] inline void decode(const DecodeRows& rows, int64_t begin, int64_t end, float* scratch) {
  constexpr int kRows = static_cast<int>(rows_together(kLanes));
  std::fill_n(scratch + rows.groups, kRows * rows.blocks * kLanes, 0.0F);
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) decode_together<kLanes, kRows>(rows, row, scratch);
  for (; row < end; ++row) decode_together<kLanes, 1>(rows, row, scratch);
}

template <int kLanes>
[[gnu::always_inline]] inline void project(const uint16_t* a, const float* x, int64_t columns, int64_t begin,
                                           int64_t end, float* out) {
  constexpr int kRows = static_cast<int>(rows_together(kLanes));
  int64_t row = begin;
  const auto next = [&]<int kCount>(float(&dots)[kCount]) __attribute__((always_inline)) {
    dot_bfloat16<kLanes>(a + row * columns, x, columns, dots);
    for (const float dot : dots) out[row++] = dot;
  };
  float several[kRows], one[1];
  while (row + kRows <= end) next(several);
  while (row < end) next(one);
}

#if defined(__x86_64__)
__attribute__((target("avx512f"))) void decode_avx512(const DecodeRows& rows, int64_t begin, int64_t end,
                                                      float* scratch) {
  decode<16>(rows, begin, end, scratch);
}
__attribute__((target("avx512f"))) void project_avx512(const uint16_t* a, const float* x, int64_t columns,
                                                       int64_t begin, int64_t end, float* out) {
  project<16>(a, x, columns, begin, end, out);
}
__attribute__((target("avx2,fma"))) void decode_avx2(const DecodeRows& rows, int64_t begin, int64_t end,
                                                     float* scratch) {
  decode<8>(rows, begin, end, scratch);
}
__attribute__((target("avx2,fma"))) void project_avx2(const uint16_t* a, const float* x, int64_t columns, int64_t begin,
                                                      int64_t end, float* out) {
  project<8>(a, x, columns, begin, end, out);
}
#endif
void decode_baseline(const DecodeRows& rows, int64_t begin, int64_t end, float* scratch) {
  decode<8>(rows, begin, end, scratch);
}
void project_baseline(const uint16_t* a, const float* x, int64_t columns, int64_t begin, int64_t end, float* out) {
  project<8>(a, x, columns, begin, end, out);
}

}  // namespace

void pair_up(const float* x, int64_t n, int64_t lanes, float* out) {
  const int64_t whole = n / (2 * lanes) * 2 * lanes;
  for (int64_t i = 0; i < whole; i += 2 * lanes) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      out[i + lane] = x[i + 2 * lane];
      out[i + lanes + lane] = x[i + 2 * lane + 1];
    }
  }
  std::copy(x + whole, x + n, out + whole);
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
