#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "panel_arithmetic.h"
#include "row_functions.h"

/// vpmaddubsw multiplies unsigned bytes by signed ones and adds two neighbours in int16 with saturation. Several of its
/// results are added in int16 before they are widened, as many as cannot overflow: the sums stay exact.
/// The attribute stands on every function, since intrinsics are inlined only into functions that have it.
namespace baseq {
namespace {

/// Results of vpmaddubsw that fit into int16: 0 where even one may not.
constexpr int64_t run_length(int64_t num_bits, int64_t max_code) {
  return 32767 / (2 * ((int64_t{1} << num_bits) - 1) * max_code);
}
/// Codes of more bits are split into two parts of four.
constexpr int64_t kPartBits = 4;
constexpr bool splits(int64_t num_bits, int64_t max_code) { return run_length(num_bits, max_code) < 2; }

/// Up to so many rows of activations are multiplied while the codes are unpacked; with more, unpacking them to memory
/// once is faster.
constexpr int64_t kNarrowRows = 3;
/// Rows of activations whose sums stay in registers.
constexpr int kTileRows = 6;
/// The processor's own prefetching stops at the end of a page.
constexpr int64_t kPrefetchBytes = 2048;

__attribute__((target("avx2,fma"), always_inline)) inline __m256i load(const void* bytes) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(bytes));
}

__attribute__((target("avx2,fma"), always_inline)) inline __m256i broadcast_codes(const int8_t* codes) {
  int32_t four;
  std::memcpy(&four, codes, sizeof(four));
  return _mm256_set1_epi32(four);
}

/// 32 unpacked codes: one half of slice `slice` of a chunk.
template <int kBits>
__attribute__((target("avx2,fma"), always_inline)) inline __m256i unpack_half(const uint8_t* chunk, int slice,
                                                                              int half) {
  __m256i codes = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int width = 8; width > 0; width /= 2) {
    if ((kBits & width) == 0) continue;
    const PlaneShift plane = plane_of(kBits, width);
    const int in_block = 8 / width, right = slice % in_block * width - plane.shift;
    __m256i block = load(chunk + plane.offset + slice / in_block * kBlockBytes + half * 32);
    if (right > 0) block = _mm256_srli_epi16(block, right);
    if (right < 0) block = _mm256_slli_epi16(block, -right);
    if (width < 8)
      block = _mm256_and_si256(block, _mm256_set1_epi8(static_cast<char>(((1 << width) - 1) << plane.shift)));
    codes = width == 8 ? block : _mm256_or_si256(codes, block);
  }
  return codes;
}

/// A group's sums of kRows rows of activations, unpacking the weights in registers.
/// @param codes  the first row's codes of this group; rows are `stride` apart
/// @param sums   [kRows, 16]
template <int kBits, int kMaxCode, int kRows>
__attribute__((target("avx2,fma"), always_inline)) inline void sum_packed_group(const uint8_t* chunk,
                                                                                const int8_t* codes, int64_t stride,
                                                                                int64_t chunks, int32_t* sums) {
  constexpr bool kSplit = splits(kBits, kMaxCode);
  constexpr int64_t kRun =
      std::min(kSlicesPerChunk, kSplit ? run_length(kPartBits, kMaxCode) : run_length(kBits, kMaxCode));
  static_assert(kRun >= 2);
  constexpr int kParts = kSplit ? 2 : 1;
  const __m256i ones = _mm256_set1_epi16(1), sixteens = _mm256_set1_epi16(1 << kPartBits);
  const __m256i mask = _mm256_set1_epi8((1 << kPartBits) - 1);
  __m256i wide[kRows][2];
  for (int r = 0; r < kRows; ++r) wide[r][0] = wide[r][1] = _mm256_setzero_si256();
  for (int64_t c = 0; c < chunks; ++c, chunk += kBits * kBlockBytes, codes += kChunkColumns) {
    for (int block = 0; block < kBits; ++block) {
      _mm_prefetch(reinterpret_cast<const char*>(chunk) + kPrefetchBytes + block * kBlockBytes, _MM_HINT_T0);
    }
    __m256i narrow[kRows][2][kParts];
#pragma GCC unroll 8
    for (int slice = 0; slice < kSlicesPerChunk; ++slice) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m256i weights = unpack_half<kBits>(chunk, slice, half);
        __m256i parts[2] = {weights, weights};
        if constexpr (kSplit) {
          parts[0] = _mm256_and_si256(weights, mask);
          parts[1] = _mm256_and_si256(_mm256_srli_epi16(weights, kPartBits), mask);
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const __m256i four = broadcast_codes(codes + r * stride + slice * kSliceColumns);
#pragma GCC unroll 2
          for (int p = 0; p < kParts; ++p) {
            const __m256i product = _mm256_maddubs_epi16(parts[p], four);
            __m256i& sum = narrow[r][half][p];
            sum = slice % kRun == 0 ? product : _mm256_add_epi16(sum, product);
          }
        }
      }
      if ((slice + 1) % kRun != 0 && slice + 1 != kSlicesPerChunk) continue;
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          __m256i& sum = wide[r][half];
          sum = _mm256_add_epi32(sum, _mm256_madd_epi16(narrow[r][half][0], ones));
          if constexpr (kSplit) sum = _mm256_add_epi32(sum, _mm256_madd_epi16(narrow[r][half][kParts - 1], sixteens));
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int half = 0; half < 2; ++half) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + r * kPanelRows + half * 8), wide[r][half]);
    }
  }
}

/// Factors of one column for half a panel.
template <StoredType kType>
__attribute__((target("avx2,fma"), always_inline)) inline __m256 load_factors(const void* values, int64_t i) {
  if constexpr (kType == StoredType::kFloat) {
    return _mm256_loadu_ps(static_cast<const float*>(values) + i);
  } else if constexpr (kType == StoredType::kInt8) {
    const auto* stored = reinterpret_cast<const __m128i*>(static_cast<const int8_t*>(values) + i);
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(stored)));
  } else {
    const auto* stored = reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(values) + i);
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(stored));
    if constexpr (kType == StoredType::kBFloat16) return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
    const __m256i magnitude = _mm256_slli_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fff)), 13);
    const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x8000)), 16);
    return _mm256_or_ps(_mm256_mul_ps(_mm256_castsi256_ps(magnitude), _mm256_set1_ps(0x1p112F)),
                        _mm256_castsi256_ps(sign));
  }
}

/// factor_row of kRows rows, whose totals are total_stride apart.
template <StoredType kType, int kRows>
__attribute__((target("avx2,fma"))) void factor_rows(const FactorPanels& factors, int64_t panel, const float* values,
                                                     float* total, int64_t total_stride) {
  const int64_t columns = factors.columns, first = panel * columns * kPanelRows;
  for (int64_t half = 0; half < kPanelRows; half += 8) {
    __m256 chains[kRows][4];
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < 4; ++c) chains[r][c] = _mm256_setzero_ps();
    }
    for (int64_t k = 0; k < columns; k += 4) {
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        const __m256 column = load_factors<kType>(factors.values, first + (k + c) * kPanelRows + half);
#pragma GCC unroll 3
        for (int r = 0; r < kRows; ++r) {
          chains[r][c] = _mm256_fmadd_ps(column, _mm256_broadcast_ss(values + r * columns + k + c), chains[r][c]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      _mm256_storeu_ps(total + r * total_stride + half, _mm256_add_ps(_mm256_add_ps(chains[r][0], chains[r][1]),
                                                                      _mm256_add_ps(chains[r][2], chains[r][3])));
    }
  }
}

template <StoredType kType>
__attribute__((target("avx2,fma"))) void factor_rows_of(const FactorPanels& factors, int64_t panel, const float* values,
                                                        int64_t rows, float* total, int64_t total_stride) {
  constexpr int kTogether = 3;
  int64_t row = 0;
  for (; row + kTogether <= rows; row += kTogether) {
    factor_rows<kType, kTogether>(factors, panel, values + row * factors.columns, total + row * total_stride,
                                  total_stride);
  }
  for (; row < rows; ++row) {
    factor_rows<kType, 1>(factors, panel, values + row * factors.columns, total + row * total_stride, total_stride);
  }
}

__attribute__((target("avx2,fma"))) void add_factors(const FactorPanels& factors, int64_t panel, const float* values,
                                                     int64_t rows, float* total, int64_t total_stride) {
  switch (factors.type) {
    case StoredType::kFloat:
      return factor_rows_of<StoredType::kFloat>(factors, panel, values, rows, total, total_stride);
    case StoredType::kBFloat16:
      return factor_rows_of<StoredType::kBFloat16>(factors, panel, values, rows, total, total_stride);
    case StoredType::kHalf:
      return factor_rows_of<StoredType::kHalf>(factors, panel, values, rows, total, total_stride);
    case StoredType::kInt8:
      return factor_rows_of<StoredType::kInt8>(factors, panel, values, rows, total, total_stride);
  }
}

/// Where the float sums of rows `row` and following begin: B t of a low-rank correction, or zero.
__attribute__((target("avx2,fma"), always_inline)) inline void start_rows(const Panel& panel, int64_t row, int64_t rows,
                                                                          float* total) {
  const FactorPanels& up = panel.weights.up;
  if (up.values == nullptr) {
    std::fill_n(total, rows * kPanelRows, 0.0F);
  } else {
    add_factors(up, panel.index, panel.x.projected + row * up.columns, rows, total, kPanelRows);
  }
}

/// The float part of a group for `rows` rows of codes from `row` on, whose sums are [rows, 16].
template <int kPlanes>
__attribute__((target("avx2,fma"), always_inline)) inline void add_groups(const Panel& panel, int64_t row, int64_t rows,
                                                                          int64_t group, const int32_t* sums,
                                                                          float* total) {
  for (int64_t r = 0; r < rows; ++r) {
    add_group<kPlanes>(panel, row + r, group, sums + r * kPlanes * kPanelRows, total + r * kPanelRows);
  }
}

/// All rows of a few: kRows counts planes.
template <int kBits, int kMaxCode, int kRows>
__attribute__((target("avx2,fma"))) void multiply_narrow(const Panel& panel) {
  const WeightPanels& weights = panel.weights;
  const int64_t chunks = weights.group_columns / kChunkColumns, planes = panel.x.planes, rows = kRows / planes;
  alignas(64) float total[kRows * kPanelRows];
  alignas(64) int32_t sums[kRows * kPanelRows];
  start_rows(panel, 0, rows, total);
  const uint8_t* chunk = panel.chunks;
  for (int64_t group = 0; group < weights.groups; ++group, chunk += chunks * kBits * kBlockBytes) {
    sum_packed_group<kBits, kMaxCode, kRows>(chunk, panel.x.codes + group * weights.group_columns, panel.columns(),
                                             chunks, sums);
    if (planes == 1) {
      add_groups<1>(panel, 0, rows, group, sums, total);
    } else {
      add_groups<2>(panel, 0, rows, group, sums, total);
    }
  }
  for (int64_t r = 0; r < rows; ++r) store_row(panel, r, total + r * kPanelRows);
}

/// Unpacks a panel to bytes; `split`: their low and high parts.
template <int kBits>
__attribute__((target("avx2,fma"))) void unpack_panel(const Panel& panel, bool split) {
  const __m256i mask = _mm256_set1_epi8((1 << kPartBits) - 1);
  const int64_t chunks = panel.columns() / kChunkColumns;
  auto* low = reinterpret_cast<__m256i*>(panel.low);
  auto* high = reinterpret_cast<__m256i*>(panel.high);
  for (int64_t c = 0; c < chunks; ++c) {
    const uint8_t* chunk = panel.chunks + c * kBits * kBlockBytes;
    for (int block = 0; block < kBits; ++block) {
      _mm_prefetch(reinterpret_cast<const char*>(chunk) + kPrefetchBytes + block * kBlockBytes, _MM_HINT_T0);
    }
#pragma GCC unroll 8
    for (int slice = 0; slice < kSlicesPerChunk; ++slice) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m256i codes = unpack_half<kBits>(chunk, slice, half);
        _mm256_store_si256(low++, split ? _mm256_and_si256(codes, mask) : codes);
        if (split) _mm256_store_si256(high++, _mm256_and_si256(_mm256_srli_epi16(codes, kPartBits), mask));
      }
    }
  }
}

/// Adds the sums of kRows rows of activations with unpacked weights, times `factor`.
template <int kRows>
__attribute__((target("avx2,fma"), always_inline)) inline void sum_slices(const uint8_t* weights, const int8_t* codes,
                                                                          int64_t stride, int64_t slices, int64_t run,
                                                                          __m256i factor, __m256i* sums) {
  for (int64_t begin = 0; begin < slices; begin += run) {
    const int64_t end = std::min(slices, begin + run);
    __m256i narrow[kRows][2];
    for (int r = 0; r < kRows; ++r) narrow[r][0] = narrow[r][1] = _mm256_setzero_si256();
    for (int64_t slice = begin; slice < end; ++slice) {
      const __m256i left = load(weights + slice * kBlockBytes), right = load(weights + slice * kBlockBytes + 32);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const __m256i four = broadcast_codes(codes + r * stride + slice * kSliceColumns);
        narrow[r][0] = _mm256_add_epi16(narrow[r][0], _mm256_maddubs_epi16(left, four));
        narrow[r][1] = _mm256_add_epi16(narrow[r][1], _mm256_maddubs_epi16(right, four));
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      sums[2 * r] = _mm256_add_epi32(sums[2 * r], _mm256_madd_epi16(narrow[r][0], factor));
      sums[2 * r + 1] = _mm256_add_epi32(sums[2 * r + 1], _mm256_madd_epi16(narrow[r][1], factor));
    }
  }
}

/// kRows rows of codes, planes counted, from row `row` of the activations on, with an unpacked panel.
template <int kPlanes, int kRows>
__attribute__((target("avx2,fma"))) void multiply_tile(const Panel& panel, int64_t row) {
  const WeightPanels& weights = panel.weights;
  const int64_t slices = panel.slices_per_group(), stride = panel.columns(), max_code = panel.x.max_code;
  const bool split = splits(weights.num_bits, max_code);
  const int64_t run = run_length(split ? kPartBits : weights.num_bits, max_code);
  constexpr int kTokens = kRows / kPlanes;
  alignas(64) float total[kRows * kPanelRows];
  alignas(64) __m256i sums[kRows * 2];
  start_rows(panel, row, kTokens, total);
  for (int64_t group = 0; group < weights.groups; ++group) {
    const int8_t* codes = panel.x.codes + row * kPlanes * stride + group * weights.group_columns;
    const int64_t first = group * slices * kBlockBytes;
    for (__m256i& sum : sums) sum = _mm256_setzero_si256();
    sum_slices<kRows>(panel.low + first, codes, stride, slices, run, _mm256_set1_epi16(1), sums);
    if (split) {
      sum_slices<kRows>(panel.high + first, codes, stride, slices, run, _mm256_set1_epi16(1 << kPartBits), sums);
    }
    add_groups<kPlanes>(panel, row, kTokens, group, reinterpret_cast<const int32_t*>(sums), total);
  }
  for (int64_t r = 0; r < kTokens; ++r) store_row(panel, row + r, total + r * kPanelRows);
}

template <int kPlanes>
__attribute__((target("avx2,fma"))) void multiply_wide(const Panel& panel) {
  using Tile = void (*)(const Panel&, int64_t);
  constexpr int kTokens = kTileRows / kPlanes;
  int64_t row = 0;
  for (; row + kTokens <= panel.x.rows; row += kTokens) multiply_tile<kPlanes, kTileRows>(panel, row);
  const int64_t left = panel.x.rows - row;
  if (left == 0) return;
  if constexpr (kPlanes == 1) {
    constexpr Tile kTiles[] = {multiply_tile<1, 1>, multiply_tile<1, 2>, multiply_tile<1, 3>, multiply_tile<1, 4>,
                               multiply_tile<1, 5>};
    kTiles[left - 1](panel, row);
  } else {
    constexpr Tile kTiles[] = {multiply_tile<2, 2>, multiply_tile<2, 4>};
    kTiles[left - 1](panel, row);
  }
}

template <int kBits>
__attribute__((target("avx2,fma"))) void multiply_panel(const Panel& panel) {
  const int64_t rows = panel.x.rows * panel.x.planes;
  if (rows <= kNarrowRows) {
    using Narrow = void (*)(const Panel&);
    constexpr Narrow kSmall[] = {multiply_narrow<kBits, 15, 1>, multiply_narrow<kBits, 15, 2>,
                                 multiply_narrow<kBits, 15, 3>};
    constexpr Narrow kLarge[] = {multiply_narrow<kBits, 128, 1>, multiply_narrow<kBits, 128, 2>,
                                 multiply_narrow<kBits, 128, 3>};
    return (panel.x.max_code <= 15 ? kSmall : kLarge)[rows - 1](panel);
  }
  unpack_panel<kBits>(panel, splits(kBits, panel.x.max_code));
  return panel.x.planes == 1 ? multiply_wide<1>(panel) : multiply_wide<2>(panel);
}

__attribute__((target("avx2,fma"))) void multiply(const WeightPanels& weights, const CodeRows& x, int64_t begin,
                                                  int64_t end, void* scratch, float* y) {
  constexpr void (*kOfBits[])(const Panel&) = {multiply_panel<2>, multiply_panel<3>, multiply_panel<4>,
                                               multiply_panel<5>, multiply_panel<6>, multiply_panel<7>,
                                               multiply_panel<8>};
  if (x.rows == 0) return;
  for (int64_t index = begin; index < end; ++index) {
    kOfBits[weights.num_bits - 2](open_panel(weights, x, index, /*signed_codes=*/false, scratch, y));
  }
}

__attribute__((target("avx2,fma"))) void project(const FactorPanels& factors, const float* values, int64_t rows,
                                                 float* out) {
  const int64_t stride = factors.panels * kPanelRows;
  for (int64_t panel = 0; panel < factors.panels; ++panel) {
    add_factors(factors, panel, values, rows, out + panel * kPanelRows, stride);
  }
}

#if defined(__clang__)
using Rows = PortableRows;
#else
using Rows = Avx2Rows;
#endif

bool supported() { return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0; }

}  // namespace

const IntegerKernels kAvx2Kernels{"avx2",       supported,      multiply,           project,
                                  Rows::attend, Rows::rms_norm, Rows::silu_product, Rows::rope};

}  // namespace baseq

#endif
