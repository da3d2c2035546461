#include "hadamard_kernel.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>

namespace baseq {
namespace {

// Everything below works on runs of kLanes neighbouring elements, so that each innermost loop has a constant length and
// becomes a few vector instructions in whichever clone of the entry functions it is inlined into.
constexpr int64_t kLanes = 16;
constexpr int64_t kBlock = 64;          // elements transformed at once by low_bits
constexpr int64_t kGroupsPerTable = 8;  // 8 groups of 16 signed sums of kLanes floats: 8 KiB, a quarter of an L1 cache

template <class T>
struct alignas(64) Lanes {
  T value[kLanes];
};

template <class T>
[[gnu::always_inline]] inline Lanes<T> load(const T* x) {
  Lanes<T> result;
  for (int64_t l = 0; l < kLanes; ++l) result.value[l] = x[l];
  return result;
}

template <class T>
[[gnu::always_inline]] inline void store(T* x, const Lanes<T>& v, T scale) {
  for (int64_t l = 0; l < kLanes; ++l) x[l] = v.value[l] * scale;
}

template <class T>
[[gnu::always_inline]] inline Lanes<T> operator+(const Lanes<T>& a, const Lanes<T>& b) {
  Lanes<T> result;
  for (int64_t l = 0; l < kLanes; ++l) result.value[l] = a.value[l] + b.value[l];
  return result;
}

template <class T>
[[gnu::always_inline]] inline Lanes<T> operator-(const Lanes<T>& a, const Lanes<T>& b) {
  Lanes<T> result;
  for (int64_t l = 0; l < kLanes; ++l) result.value[l] = a.value[l] - b.value[l];
  return result;
}

template <class T>
using Table = std::array<Lanes<T>, kGroupsPerTable * 16>;

/// One radix-4 pass over kSize elements: transforms the lowest base-4 digit of the index and moves it to the top, so
/// that a pass per digit transforms all of them and restores the order. Loads are 4-way interleaved, stores contiguous.
/// kBits of the digit take part (2: both, 1: the low one, 0: none, the pass only moves).
template <int kBits, int64_t kSize, class T>
[[gnu::always_inline]] inline void digit_pass(const T* __restrict x, T* __restrict y, T scale) {
  constexpr int64_t kQuarter = kSize / 4;
  for (int64_t i = 0; i < kQuarter; ++i) {
    const T a = x[4 * i], b = x[4 * i + 1], c = x[4 * i + 2], d = x[4 * i + 3];
    if constexpr (kBits == 2) {
      y[i] = ((a + b) + (c + d)) * scale;
      y[kQuarter + i] = ((a - b) + (c - d)) * scale;
      y[2 * kQuarter + i] = ((a + b) - (c + d)) * scale;
      y[3 * kQuarter + i] = ((a - b) - (c - d)) * scale;
    } else if constexpr (kBits == 1) {
      y[i] = (a + b) * scale;
      y[kQuarter + i] = (a - b) * scale;
      y[2 * kQuarter + i] = (c + d) * scale;
      y[3 * kQuarter + i] = (c - d) * scale;
    } else {
      y[i] = a * scale;
      y[kQuarter + i] = b * scale;
      y[2 * kQuarter + i] = c * scale;
      y[3 * kQuarter + i] = d * scale;
    }
  }
}

/// The transpose of a contiguous 16 x 16 block: two of its index's four base-4 digits move to the top.
template <class T>
[[gnu::always_inline]] inline void transpose_block(const T* x, T* y) {
  alignas(64) T half[kLanes * kLanes];
  digit_pass<0, kLanes * kLanes>(x, half, T(1));
  digit_pass<0, kLanes * kLanes>(half, y, T(1));
}

/// x [rows, size] -> y [size, kLanes], rows at most kLanes.
template <class T>
[[gnu::always_inline]] inline void rows_to_lanes(const T* x, T* y, int64_t rows, int64_t size) {
  alignas(64) T block[kLanes * kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t row = 0; row < rows; ++row) store(block + row * kLanes, load(x + row * size + i), T(1));
    transpose_block(block, y + i * kLanes);
  }
  for (; i < size; ++i) {
    for (int64_t row = 0; row < rows; ++row) y[i * kLanes + row] = x[row * size + i];
  }
}

/// The inverse of rows_to_lanes.
template <class T>
[[gnu::always_inline]] inline void lanes_to_rows(const T* x, T* y, int64_t rows, int64_t size) {
  alignas(64) T block[kLanes * kLanes];
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    transpose_block(x + i * kLanes, block);
    for (int64_t row = 0; row < rows; ++row) store(y + row * size + i, load(block + row * kLanes), T(1));
  }
  for (; i < size; ++i) {
    for (int64_t row = 0; row < rows; ++row) y[row * size + i] = x[i * kLanes + row];
  }
}

/// H_2^kBits on each run of 2^kBits elements, kBits from 4 to 6.
template <int kBits, class T>
[[gnu::always_inline]] inline void low_bits(const T* x, T* y, int64_t size, T scale) {
  alignas(64) T first[kBlock];
  alignas(64) T second[kBlock];
  for (int64_t i = 0; i < size; i += kBlock) {
    digit_pass<2, kBlock>(x + i, first, T(1));
    digit_pass<2, kBlock>(first, second, T(1));
    digit_pass<kBits - 4, kBlock>(second, y + i, scale);
  }
}

/// kRadix strided runs in place: H_kRadix across them.
template <int kRadix, class T>
[[gnu::always_inline]] inline void butterfly(T* x, int64_t stride, T scale) {
  Lanes<T> v[kRadix];
  for (int r = 0; r < kRadix; ++r) v[r] = load(x + r * stride);
  for (int h = 1; h < kRadix; h *= 2) {
    for (int r = 0; r < kRadix; ++r) {
      if ((r & h) != 0) continue;
      const Lanes<T> a = v[r], b = v[r + h];
      v[r] = a + b;
      v[r + h] = a - b;
    }
  }
  for (int r = 0; r < kRadix; ++r) store(x + r * stride, v[r], scale);
}

template <int kRadix, class T>
[[gnu::always_inline]] inline void butterfly_pass(T* x, int64_t size, int64_t stride, T scale) {
  for (int64_t block = 0; block < size; block += kRadix * stride) {
    for (int64_t l = 0; l < stride; l += kLanes) butterfly<kRadix>(x + block + l, stride, scale);
  }
}

/// The bits of the index from `stride` (at least kLanes) up to `end`, in place.
template <class T>
[[gnu::always_inline]] inline void high_bits(T* x, int64_t size, int64_t stride, int64_t end, T scale) {
  while (stride < end) {
    const int64_t left = end / stride;
    // 16 = 4 * 4 rather than 8 * 2
    const int64_t radix = left >= 8 && left != 16 ? 8 : left >= 4 ? 4 : 2;
    const T pass_scale = left == radix ? scale : T(1);
    if (radix == 8) butterfly_pass<8>(x, size, stride, pass_scale);
    if (radix == 4) butterfly_pass<4>(x, size, stride, pass_scale);
    if (radix == 2) butterfly_pass<2>(x, size, stride, pass_scale);
    stride *= radix;
  }
}

/// table[code] = +-a +-b +-c +-d, a minus sign where the code has a bit.
template <class T>
[[gnu::always_inline]] inline void signed_sums(const T* x, int64_t stride, Lanes<T>* table) {
  const Lanes<T> a = load(x), b = load(x + stride), c = load(x + 2 * stride), d = load(x + 3 * stride);
  const Lanes<T> ab[2] = {a + b, b - a};  // codes 0 and 1; 3 and 2 are their negatives
  const Lanes<T> cd[2] = {c + d, d - c};
  const Lanes<T> zero = {};
  for (int high = 0; high < 2; ++high) {
    for (int low = 0; low < 2; ++low) {
      table[4 * high + low] = cd[high] + ab[low];
      table[4 * high + 3 - low] = cd[high] - ab[low];
      table[4 * (3 - high) + low] = ab[low] - cd[high];
      table[4 * (3 - high) + 3 - low] = zero - (cd[high] + ab[low]);
    }
  }
}

/// y[r] = (partial[r] + the kGroups entries of the table that codes[r] names) * scale, for every output r.
template <int kGroups, class T>
[[gnu::always_inline]] inline void add_groups(const Table<T>& table, const SignFactor& factor, int64_t first_group,
                                              const Lanes<T>* partial, T* y, int64_t stride, T scale) {
  const int64_t num_groups = factor.order / 4;
  for (int64_t r = 0; r < factor.order; ++r) {
    const uint8_t* codes = factor.codes.data() + r * num_groups + first_group;
    Lanes<T> sum = table[codes[0]];
    for (int g = 1; g < kGroups; ++g) sum = sum + table[16 * g + codes[g]];
    if (partial != nullptr) sum = sum + partial[r];
    store(y + r * stride, sum, scale);
  }
}

/// One run of kLanes columns of x [order, stride] in place: x = H^T x * scale.
template <class T>
[[gnu::always_inline]] inline void dense_columns(T* x, int64_t stride, const SignFactor& factor, Table<T>& table,
                                                 Lanes<T>* partial, T scale) {
  const int64_t num_groups = factor.order / 4;
  for (int64_t first = 0; first < num_groups; first += kGroupsPerTable) {
    const int64_t count = std::min(kGroupsPerTable, num_groups - first);
    for (int64_t g = 0; g < count; ++g) signed_sums(x + 4 * (first + g) * stride, stride, &table[16 * g]);
    // The inputs are read until the last table stands; only then may the outputs overwrite them.
    const bool last = first + count == num_groups;
    const Lanes<T>* before = first == 0 ? nullptr : partial;
    T* out = last ? x : partial->value;
    const int64_t out_stride = last ? stride : kLanes;
    const T out_scale = last ? scale : T(1);
    switch (count) {
      case 1:
        add_groups<1>(table, factor, first, before, out, out_stride, out_scale);
        break;
      case 2:
        add_groups<2>(table, factor, first, before, out, out_stride, out_scale);
        break;
      case 3:
        add_groups<3>(table, factor, first, before, out, out_stride, out_scale);
        break;
      case 4:
        add_groups<4>(table, factor, first, before, out, out_stride, out_scale);
        break;
      case 5:
        add_groups<5>(table, factor, first, before, out, out_stride, out_scale);
        break;
      case 6:
        add_groups<6>(table, factor, first, before, out, out_stride, out_scale);
        break;
      case 7:
        add_groups<7>(table, factor, first, before, out, out_stride, out_scale);
        break;
      default:
        add_groups<8>(table, factor, first, before, out, out_stride, out_scale);
    }
  }
}

/// The dense factors of x [m1, m2, ..., inner], `inner` a multiple of kLanes, in place. The last one scales.
template <class T>
[[gnu::always_inline]] inline void dense_factors(T* x, int64_t size, int64_t inner, const HadamardKernel& kernel,
                                                 Table<T>& table, Lanes<T>* partial, T scale) {
  for (size_t f = kernel.factors.size(); f-- > 0;) {
    const SignFactor& factor = kernel.factors[f];
    for (int64_t block = 0; block < size; block += factor.order * inner) {
      for (int64_t l = 0; l < inner; l += kLanes) {
        dense_columns(x + block + l, inner, factor, table, partial, f == 0 ? scale : T(1));
      }
    }
    inner *= factor.order;
  }
}

template <class T>
struct Workspace {
  Table<T> table;
  std::vector<Lanes<T>> partial;
  std::vector<Lanes<T>> tile;
};

/// Rows whose power of two holds at least one run of lanes.
template <class T>
[[gnu::always_inline]] inline void transform_rows(const T* x, T* y, int64_t rows, const HadamardKernel& kernel,
                                                  Workspace<T>& work) {
  const int64_t size = kernel.size;
  const T scale = static_cast<T>(kernel.scale);
  const T dense_first = kernel.factors.empty() ? scale : T(1);
  const T low_scale = kernel.power_of_two <= kBlock ? dense_first : T(1);
  for (int64_t row = 0; row < rows; ++row, x += size, y += size) {
    if (kernel.power_of_two == 16) {
      low_bits<4>(x, y, size, low_scale);
    } else if (kernel.power_of_two == 32) {
      low_bits<5>(x, y, size, low_scale);
    } else {
      low_bits<6>(x, y, size, low_scale);
    }
    high_bits(y, size, kBlock, kernel.power_of_two, dense_first);
    dense_factors(y, size, kernel.power_of_two, kernel, work.table, work.partial.data(), scale);
  }
}

/// Rows too short for that: kLanes of them at a time, transposed, so that the lanes run across the rows.
template <class T>
[[gnu::always_inline]] inline void transform_row_tile(const T* x, T* y, int64_t rows, const HadamardKernel& kernel,
                                                      Workspace<T>& work) {
  const int64_t size = kernel.size;
  const T scale = static_cast<T>(kernel.scale);
  T* tile = work.tile[0].value;
  rows_to_lanes(x, tile, rows, size);
  high_bits(tile, size * kLanes, kLanes, kernel.power_of_two * kLanes, kernel.factors.empty() ? scale : T(1));
  dense_factors(tile, size * kLanes, kernel.power_of_two * kLanes, kernel, work.table, work.partial.data(), scale);
  lanes_to_rows(tile, y, rows, size);
}

bool fits_lanes(const HadamardKernel& kernel) { return kernel.power_of_two >= kLanes && kernel.size % kBlock == 0; }

template <class T>
[[gnu::always_inline]] inline void transform_any(const T* x, T* y, int64_t rows, const HadamardKernel& kernel,
                                                 Workspace<T>& work) {
  if (fits_lanes(kernel)) {
    transform_rows(x, y, rows, kernel, work);
    return;
  }
  for (int64_t row = 0; row < rows; row += kLanes) {
    transform_row_tile(x + row * kernel.size, y + row * kernel.size, std::min(kLanes, rows - row), kernel, work);
  }
}

__attribute__((target_clones("avx512f", "avx2", "default"))) void transform_chunk(const float* x, float* y,
                                                                                  int64_t rows,
                                                                                  const HadamardKernel& kernel,
                                                                                  Workspace<float>& work) {
  transform_any(x, y, rows, kernel, work);
}

__attribute__((target_clones("avx512f", "avx2", "default"))) void transform_chunk(const double* x, double* y,
                                                                                  int64_t rows,
                                                                                  const HadamardKernel& kernel,
                                                                                  Workspace<double>& work) {
  transform_any(x, y, rows, kernel, work);
}

template <class T>
void hadamard_rows_in_parallel(const T* x, T* y, int64_t rows, const HadamardKernel& kernel) {
  int64_t largest_order = 0;
  for (const SignFactor& factor : kernel.factors) largest_order = std::max(largest_order, factor.order);
  const int64_t grain = std::max<int64_t>(1, 32768 / kernel.size);
  const int64_t tile_rows = fits_lanes(kernel) ? 1 : kLanes;
  at::parallel_for(0, (rows + tile_rows - 1) / tile_rows, std::max<int64_t>(1, grain / tile_rows),
                   [&](int64_t begin, int64_t end) {
                     Workspace<T> work;  // the table is written before it is read
                     work.partial.resize(largest_order);
                     if (tile_rows > 1) work.tile.resize(kernel.size);
                     const int64_t first = begin * tile_rows;
                     const int64_t count = std::min(end * tile_rows, rows) - first;
                     transform_chunk(x + first * kernel.size, y + first * kernel.size, count, kernel, work);
                   });
}

}  // namespace

SignFactor::SignFactor(const SignMatrix& h) : order(h.rows()), codes(h.rows() * h.rows() / 4, 0) {
  for (int64_t r = 0; r < order; ++r) {
    for (int64_t i = 0; i < order; ++i) {
      if (h(i, r) < 0) codes[r * (order / 4) + i / 4] |= uint8_t(1u << (i % 4));
    }
  }
}

void hadamard_rows(const float* x, float* y, int64_t rows, const HadamardKernel& kernel) {
  hadamard_rows_in_parallel(x, y, rows, kernel);
}

void hadamard_rows(const double* x, double* y, int64_t rows, const HadamardKernel& kernel) {
  hadamard_rows_in_parallel(x, y, rows, kernel);
}

}  // namespace baseq
