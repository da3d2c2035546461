#pragma once

#include <bit>
#include <cstdint>

#include "integer_kernels.h"

/// The parts of the kernels that are the same for every instruction set, inlined into a version for each. The loops
/// over the 16 rows of a panel become vector instructions. Every float operation is rounded on its own and every fused
/// one is written as such: the sources of this folder are compiled without contraction.
namespace baseq {

/// So many of `code_rows` rows of codes, planes counted, are multiplied with a panel that is unpacked once: as many as
/// fit a cache, a multiple of all tiles.
constexpr int64_t code_rows_of_block(int64_t columns, int64_t code_rows) {
  constexpr int64_t kBlockOfCodes = 1 << 19, kMost = 480, kMultiple = 24;
  const int64_t fitting = kBlockOfCodes / columns / kMultiple * kMultiple;
  const int64_t rows = fitting < kMultiple ? kMultiple : fitting > kMost ? kMost : fitting;
  return rows < code_rows ? rows : code_rows;
}

/// A panel while its products are computed.
struct Panel {
  const WeightPanels& weights;
  const CodeRows& x;
  int64_t index;
  const uint8_t* chunks;  ///< packed codes
  uint8_t* low;           ///< unpacked codes: [slices, 64]
  uint8_t* high;          ///< their upper parts, where the kernel splits them
  float* scales;          ///< [groups, 16]
  int32_t* zeros;         ///< zero points [groups, 16]
  float* y;

  int64_t slices_per_group() const { return weights.group_columns / kSliceColumns; }
  int64_t columns() const { return weights.groups * weights.group_columns; }
};

template <StoredType kType>
[[gnu::always_inline]] inline float stored_value(const void* values, int64_t i) {
  if constexpr (kType == StoredType::kFloat) {
    return static_cast<const float*>(values)[i];
  } else if constexpr (kType == StoredType::kBFloat16) {
    return std::bit_cast<float>(uint32_t{static_cast<const uint16_t*>(values)[i]} << 16);
  } else if constexpr (kType == StoredType::kHalf) {
    // The product is exact, for denormal numbers too.
    const uint32_t bits = static_cast<const uint16_t*>(values)[i];
    const float magnitude = std::bit_cast<float>((bits & 0x7fffU) << 13) * 0x1p112F;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | ((bits & 0x8000U) << 16));
  } else {
    return static_cast<const int8_t*>(values)[i];
  }
}

template <StoredType kType>
[[gnu::always_inline]] inline void read_values(const void* values, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = stored_value<kType>(values, i);
}

/// Panel `index` with its scales and zero points read. `signed_codes`: the kernel subtracts 128 from 8-bit codes.
[[gnu::always_inline]] inline Panel open_panel(const WeightPanels& weights, const CodeRows& x, int64_t index,
                                               bool signed_codes, void* scratch, float* y) {
  const int64_t columns = weights.groups * weights.group_columns, count = weights.groups * kPanelRows;
  auto* low = static_cast<uint8_t*>(scratch);
  auto* high = low + columns * kPanelRows;
  auto* scales = reinterpret_cast<float*>(high + columns * kPanelRows);
  const uint8_t* stored = weights.panels + index * weights.panel_bytes;
  const uint8_t* chunks = stored + panel_header_bytes(weights.groups, weights.scale_type, weights.zero_points);
  Panel panel{weights, x, index, chunks, low, high, scales, reinterpret_cast<int32_t*>(scales + count), y};
  if (weights.scale_type == StoredType::kFloat) {
    read_values<StoredType::kFloat>(stored, count, scales);
  } else if (weights.scale_type == StoredType::kBFloat16) {
    read_values<StoredType::kBFloat16>(stored, count, scales);
  } else {
    read_values<StoredType::kHalf>(stored, count, scales);
  }
  const int32_t shift = signed_codes && weights.num_bits == 8 ? 128 : 0;
  if (weights.zero_points) {
    stored += count * bytes_of(weights.scale_type);
    for (int64_t i = 0; i < count; ++i) panel.zeros[i] = stored[i] - shift;
  } else {
    const int32_t zero = weights.zero_point - shift;
    for (int64_t i = 0; i < count; ++i) panel.zeros[i] = zero;
  }
  return panel;
}

/// Adds a group of row `row` of the activations to its float sums.
/// @param sums   [planes, 16]: sums of weight code * activation code
/// @param total  [16]
template <int kPlanes>
[[gnu::always_inline]] inline void add_group(const Panel& panel, int64_t row, int64_t group, const int32_t* sums,
                                             float* total) {
  const CodeRows& x = panel.x;
  const int64_t groups = panel.weights.groups;
  const float* scales = panel.scales + group * kPanelRows;
  const int32_t* zeros = panel.zeros + group * kPanelRows;
  const int32_t* code_sums = x.sums + row * kPlanes * groups + group;
  const float scale = x.scale[x.scales_per_row == 1 ? row : row * groups + group];
  const int32_t first_sum = code_sums[0];
  if constexpr (kPlanes == 1) {
    for (int64_t i = 0; i < kPanelRows; ++i) {
      const auto value = static_cast<float>(sums[i] - zeros[i] * first_sum);
      total[i] = __builtin_fmaf(value, scales[i] * scale, total[i]);
    }
  } else {
    const int32_t second_sum = code_sums[groups];
    for (int64_t i = 0; i < kPanelRows; ++i) {
      const auto first = static_cast<float>(sums[i] - zeros[i] * first_sum);
      const auto second = static_cast<float>(sums[kPanelRows + i] - zeros[i] * second_sum);
      total[i] = __builtin_fmaf(__builtin_fmaf(128.0F, first, second), scales[i] * scale, total[i]);
    }
  }
}

/// Adds the activations' base and the bias, and stores the rows that exist.
[[gnu::always_inline]] inline void store_row(const Panel& panel, int64_t row, float* total) {
  const int64_t first = panel.index * kPanelRows, out_features = panel.weights.out_features;
  if (panel.x.base != nullptr) {
    const float base = panel.x.base[row];
    const float* sums = panel.weights.row_sums + first;
    for (int64_t i = 0; i < kPanelRows; ++i) total[i] = __builtin_fmaf(base, sums[i], total[i]);
  }
  if (panel.weights.bias != nullptr) {
    const float* bias = panel.weights.bias + first;
    for (int64_t i = 0; i < kPanelRows; ++i) total[i] += bias[i];
  }
  float* y = panel.y + row * out_features + first;
  if (first + kPanelRows <= out_features) {
    for (int64_t i = 0; i < kPanelRows; ++i) y[i] = total[i];
  } else {
    for (int64_t i = 0; i < out_features - first; ++i) y[i] = total[i];
  }
}

/// Bits [kShift, kShift + kWidth) of the unpacked code lie in plane bits of a chunk that starts at `plane`.
struct PlaneShift {
  int width, shift;
  int64_t offset;  ///< bytes from the start of the chunk
};
/// The planes of b bits: the widest first, which has the lowest bits.
constexpr PlaneShift plane_of(int num_bits, int width) {
  if (width == 8 || width == 4) return {width, 0, 0};
  if (width == 2) return {2, num_bits & 4, (num_bits & 4) * kBlockBytes};
  return {1, num_bits & 6, (num_bits & 6) * kBlockBytes};
}

/// The code of byte `byte` of slice `slice` in a packed chunk.
[[gnu::always_inline]] inline uint8_t unpacked_code(const uint8_t* chunk, int num_bits, int slice, int64_t byte) {
  int code = 0;
#pragma GCC unroll 4
  for (int width = 8; width > 0; width /= 2) {
    if ((num_bits & width) == 0) continue;
    const PlaneShift plane = plane_of(num_bits, width);
    const int in_block = 8 / width;
    const int stored = chunk[plane.offset + slice / in_block * kBlockBytes + byte] >> (slice % in_block * width);
    code |= (stored & ((1 << width) - 1)) << plane.shift;
  }
  return static_cast<uint8_t>(code);
}

/// A sum over columns in four chains, which are added at the end: (0 + 1) + (2 + 3).
template <StoredType kType>
[[gnu::always_inline]] inline void factor_row_of(const FactorPanels& factors, int64_t panel, const float* values,
                                                 float* total) {
  const int64_t first = panel * factors.columns * kPanelRows;
  float chains[4][kPanelRows] = {};
  for (int64_t k = 0; k < factors.columns; k += 4) {
    for (int64_t c = 0; c < 4; ++c) {
      for (int64_t i = 0; i < kPanelRows; ++i) {
        const float factor = stored_value<kType>(factors.values, first + (k + c) * kPanelRows + i);
        chains[c][i] = __builtin_fmaf(factor, values[k + c], chains[c][i]);
      }
    }
  }
  for (int64_t i = 0; i < kPanelRows; ++i) total[i] = (chains[0][i] + chains[1][i]) + (chains[2][i] + chains[3][i]);
}

[[gnu::always_inline]] inline void factor_row(const FactorPanels& factors, int64_t panel, const float* values,
                                              float* total) {
  switch (factors.type) {
    case StoredType::kFloat:
      return factor_row_of<StoredType::kFloat>(factors, panel, values, total);
    case StoredType::kBFloat16:
      return factor_row_of<StoredType::kBFloat16>(factors, panel, values, total);
    case StoredType::kHalf:
      return factor_row_of<StoredType::kHalf>(factors, panel, values, total);
    case StoredType::kInt8:
      return factor_row_of<StoredType::kInt8>(factors, panel, values, total);
  }
}

}  // namespace baseq
