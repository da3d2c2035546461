#pragma once

#include "vnni_kernels.h"

/// Products of many rows of activations: tiles of sums in registers, over a panel or two unpacked to bytes.
namespace baseq {

/// What a tile multiplies: one plane with one group of columns, two planes, one plane by pairs, one plane with several
/// groups.
enum class TileKind { kOneGroup, kTwoPlanes, kPairs, kGroups };
constexpr int kTileKinds = 4;
constexpr int planes_of(TileKind kind) { return kind == TileKind::kTwoPlanes ? 2 : 1; }

/// A block of rows of activations while it is multiplied with a pair of panels.
struct TilePass {
  const WeightPanels& weights;
  const CodeRows& x;
  int64_t first_row = 0, rows = 0;  ///< of the activations
  int8_t* codes = nullptr;          ///< tile by tile: [slices, rows of the tile, 4]
  int32_t* offsets = nullptr;       ///< [code rows, groups]: where sums start
  uint8_t* bytes = nullptr;         ///< [slices, panels, 64]
  float* scales = nullptr;          ///< [groups, panels, 16]
  int32_t* zeros = nullptr;         ///< likewise, where panels have zero points
  int32_t* pair_sums = nullptr;     ///< likewise, of w_e (w_o + d)
  float* y = nullptr;
};

/// Sums of kRows rows of codes with kPanels panels over `slices` slices.
template <class Isa, bool kPairs, int kRows, int kPanels>
[[gnu::always_inline]] inline void add_slices(const uint8_t* bytes, const int8_t* codes, int64_t slices,
                                              typename Isa::Ints* sums) {
  using Words = typename Isa::Words;
  using Bytes = typename Isa::Bytes;
  constexpr int kAcross = kPanels * kVectors<Isa>, kStep = kPairs ? 2 : 1;
  for (int64_t slice = 0; slice < slices; slice += kStep) {
    Words weights[kStep * kAcross];
    repeat<kStep * kAcross>([&](auto j) __attribute__((always_inline)) {
      weights[j] = reinterpret_cast<const Words*>(bytes)[j];
    });
    repeat<kRows>([&](auto r) __attribute__((always_inline)) {
      if constexpr (kPairs) {
        const auto even = reinterpret_cast<Bytes>(Isa::broadcast(codes + r * kSliceColumns));
        const auto odd = reinterpret_cast<Bytes>(Isa::broadcast(codes + (kRows + r) * kSliceColumns));
        repeat<kAcross>([&](auto j) __attribute__((always_inline)) {
          const Bytes left = even + reinterpret_cast<Bytes>(weights[kAcross + j]);
          const Bytes right = odd + reinterpret_cast<Bytes>(weights[j]);
          Isa::dot(sums[r * kAcross + j], reinterpret_cast<Words>(left), reinterpret_cast<Words>(right));
        });
      } else {
        const Words four = Isa::broadcast(codes + r * kSliceColumns);
        repeat<kAcross>([&](auto j)
                            __attribute__((always_inline)) { Isa::dot(sums[r * kAcross + j], weights[j], four); });
      }
    });
    bytes += kStep * kPanels * kBlockBytes;
    codes += kStep * kRows * kSliceColumns;
  }
}

/// kRows rows of codes, planes counted, from code row `code_row` of the block on, with panels from `index` on.
template <class Isa, TileKind kKind, int kRows, int kPanels>
[[gnu::always_inline]] inline void multiply_tile(const TilePass& pass, int64_t code_row, int64_t index) {
  using Ints = typename Isa::Ints;
  using Floats = typename Isa::Floats;
  constexpr bool kPairs = kKind == TileKind::kPairs;
  // Floats that every group adds to stay in registers, where there are any left; one group finds them in memory.
  constexpr bool kInRegisters = Isa::kRegisters == 32 && (kKind == TileKind::kGroups || kKind == TileKind::kTwoPlanes);
  constexpr int kPlanes = planes_of(kKind), kTokens = kRows / kPlanes, kVector = kVectors<Isa>;
  constexpr int kAcross = kPanels * kVector;
  constexpr int64_t kWidth = kPanels * kPanelRows;
  const WeightPanels& weights = pass.weights;
  const CodeRows& x = pass.x;
  const int64_t groups = weights.groups, slices = weights.group_columns / kSliceColumns;
  const int64_t row = pass.first_row + code_row / kPlanes;
  const int8_t* codes = pass.codes + code_row * groups * weights.group_columns;
  const uint8_t* bytes = pass.bytes;
  // One group without a correction goes from its sums to memory at once.
  const bool at_once = groups == 1 && weights.up.values == nullptr;
  alignas(64) float total[kTokens * kWidth];
  const auto place = [&](int r, int j) __attribute__((always_inline))->Floats& {
    return *reinterpret_cast<Floats*>(total + r * kWidth + j * Isa::kLanes);
  };
  if (!at_once) {
    repeat<kTokens * kAcross>([&](auto i)
                                  __attribute__((always_inline)) { place(i / kAcross, i % kAcross) = Floats{}; });
  }
  if (weights.up.values != nullptr) {
    for (int j = 0; j < kPanels; ++j) {
      vnni_factors<Isa>(weights.up, index + j, x.projected + row * weights.up.columns, kTokens, total + j * kPanelRows,
                        kWidth);
    }
  }
  Floats kept[kInRegisters ? kTokens * kAcross : 1];
  if constexpr (kInRegisters) {
    repeat<kTokens * kAcross>([&](auto i)
                                  __attribute__((always_inline)) { kept[i] = place(i / kAcross, i % kAcross); });
  }
  for (int64_t group = 0; group < groups; ++group) {
    Ints sums[kRows * kAcross];
    repeat<kRows>([&](auto r) __attribute__((always_inline)) {
      const auto start = reinterpret_cast<Ints>(Isa::broadcast(pass.offsets + (code_row + r) * groups + group));
      repeat<kAcross>([&](auto j) __attribute__((always_inline)) { sums[r * kAcross + j] = start; });
    });
    add_slices<Isa, kPairs, kRows, kPanels>(bytes, codes, slices, sums);
    bytes += slices * kPanels * kBlockBytes;
    codes += slices * kRows * kSliceColumns;
    repeat<kAcross>([&](auto j) __attribute__((always_inline)) {
      const int64_t at = group * kWidth + j * Isa::kLanes;
      if constexpr (kPairs) {
        const Ints of_weights = *reinterpret_cast<const Ints*>(pass.pair_sums + at);
        repeat<kRows>([&](auto r) __attribute__((always_inline)) {
          sums[r * kAcross + j] = sums[r * kAcross + j] - of_weights;
        });
      }
      if (weights.zero_points) {
        const Ints zeros = *reinterpret_cast<const Ints*>(pass.zeros + at);
        repeat<kRows>([&](auto r) __attribute__((always_inline)) {
          sums[r * kAcross + j] = sums[r * kAcross + j] - zeros * x.sums[(row * kPlanes + r) * groups + group];
        });
      }
      const Floats scales = *reinterpret_cast<const Floats*>(pass.scales + at);
      repeat<kTokens>([&](auto r) __attribute__((always_inline)) {
        const float* scale = x.scale + (x.scales_per_row == 1 ? row + r : (row + r) * groups + group);
        const Ints &first = sums[r * kPlanes * kAcross + j], &second = sums[(r * kPlanes + kPlanes - 1) * kAcross + j];
        if (at_once) {
          Floats value = {};
          add_scaled<Isa, kPlanes>(first, second, scales, scale, value);
          finish_lanes<Isa>(weights, x, row + r, index + j / kVector, j % kVector, value, pass.y);
        } else if constexpr (kInRegisters) {
          add_scaled<Isa, kPlanes>(first, second, scales, scale, kept[r * kAcross + j]);
        } else {
          add_scaled<Isa, kPlanes>(first, second, scales, scale, place(r, j));
        }
      });
    });
  }
  if (at_once) return;
  if constexpr (kInRegisters) {
    repeat<kTokens * kAcross>([&](auto i)
                                  __attribute__((always_inline)) { place(i / kAcross, i % kAcross) = kept[i]; });
  }
  for (int r = 0; r < kTokens; ++r) {
    for (int j = 0; j < kPanels; ++j) {
      finish_row<Isa>(weights, x, row + r, index + j, total + r * kWidth + j * kPanelRows, pass.y);
    }
  }
}

/// The sum of (a_e + d) a_o over `columns` codes, a multiple of a chunk.
template <class Isa>
[[gnu::always_inline]] inline int32_t pair_sum(const int8_t* codes, int64_t columns) {
  using Words = typename Isa::Words;
  using Bytes = typename Isa::Bytes;
  using Longs = typename Isa::Longs;
  typename Isa::Ints sums = {};
  for (int64_t k = 0; k < columns; k += int64_t{sizeof(Words)}) {
    Words both = {};
    if (k + int64_t{sizeof(Words)} <= columns) {
      std::memcpy(&both, codes + k, sizeof(Words));  // of a constant size: one load
    } else {
      std::memcpy(&both, codes + k, static_cast<size_t>(columns - k));
    }
    const auto even = reinterpret_cast<Longs>(reinterpret_cast<Bytes>(both) + uint8_t{kPairOffset}) & 0xffffffffUL;
    Isa::dot(sums, reinterpret_cast<Words>(even), reinterpret_cast<Words>(reinterpret_cast<Longs>(both) >> 32));
  }
  int32_t total = 0;
  for (int i = 0; i < Isa::kLanes; ++i) total += sums[i];
  return total;
}

/// Four codes plus d: no byte carries over into the next one.
template <bool kPairs>
[[gnu::always_inline]] inline uint32_t even_codes(const int8_t* codes) {
  uint32_t four;
  std::memcpy(&four, codes, sizeof(four));
  if constexpr (!kPairs) return four;
  return ((four & 0x7f7f7f7fU) + uint32_t{kPairOffset} * 0x01010101U) ^ (four & 0x80808080U);
}

/// Lays out kRows rows of codes from `code_row` of the block on as a tile, and where their sums start.
template <class Isa, bool kPairs, int kRows>
[[gnu::always_inline]] inline void pack_tile(const TilePass& pass, int64_t code_row) {
  const WeightPanels& weights = pass.weights;
  const int64_t groups = weights.groups, width = weights.group_columns, columns = groups * width;
  const int64_t first = pass.first_row * pass.x.planes + code_row;
  const int8_t* codes = pass.x.codes + first * columns;
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t group = 0; group < groups; ++group) {
      int32_t offset = weights.zero_points ? 0 : -weights.zero_point * pass.x.sums[(first + r) * groups + group];
      if constexpr (kPairs) offset -= pair_sum<Isa>(codes + r * columns + group * width, width);
      pass.offsets[(code_row + r) * groups + group] = offset;
    }
  }
  auto* out = reinterpret_cast<uint32_t*>(pass.codes + code_row * columns);
  for (int64_t k = 0; k < columns; k += 2 * kSliceColumns, out += 2 * kRows) {
    for (int64_t r = 0; r < kRows; ++r) {
      out[r] = even_codes<kPairs>(codes + r * columns + k);
      std::memcpy(out + kRows + r, codes + r * columns + k + kSliceColumns, sizeof(uint32_t));
    }
  }
}

/// Unpacks kPanels panels.
template <class Isa, bool kPairs, int kBits, int kPanels>
[[gnu::always_inline]] inline void unpack_panels(const TilePass& pass, int64_t index) {
  using Words = typename Isa::Words;
  using Ints = typename Isa::Ints;
  using Floats = typename Isa::Floats;
  constexpr int kVector = kVectors<Isa>, kAcross = kPanels * kVector;
  const WeightPanels& weights = pass.weights;
  const int64_t groups = weights.groups, chunks = weights.group_columns / kChunkColumns;
  for (int panel = 0; panel < kPanels; ++panel) {
    const uint8_t* stored = weights.panels + (index + panel) * weights.panel_bytes;
    const uint8_t* chunk = stored + panel_header_bytes(groups, weights.scale_type, weights.zero_points);
    for (int64_t i = 0; i < groups * kVector; ++i) {
      const int64_t to = (i / kVector * kPanels + panel) * kPanelRows + i % kVector * Isa::kLanes;
      *reinterpret_cast<Floats*>(pass.scales + to) = load_scales<Isa>(weights.scale_type, stored, i * Isa::kLanes);
    }
    const uint8_t* zero_points = stored + groups * kPanelRows * bytes_of(weights.scale_type);
    for (int64_t i = 0; weights.zero_points && i < groups * kPanelRows; ++i) {
      pass.zeros[(i / kPanelRows * kPanels + panel) * kPanelRows + i % kPanelRows] = zero_points[i];
    }
    auto* out = reinterpret_cast<Words*>(pass.bytes) + panel * kVector;
    for (int64_t group = 0; group < groups; ++group) {
      Ints sums[kVector];
      repeat<kVector>([&](auto v) __attribute__((always_inline)) { sums[v] = Ints{}; });
      for (int64_t c = 0; c < chunks; ++c, chunk += kBits * kBlockBytes) {
        repeat<kBits>([&](auto block) __attribute__((always_inline)) { prefetch_block(chunk + block * kBlockBytes); });
        repeat<kSlicesPerChunk>([&](auto slice) __attribute__((always_inline)) {
          constexpr int kSlice = decltype(slice)::value;
          repeat<kVector>([&](auto v) __attribute__((always_inline)) {
            const Words codes = unpacked<Isa, kBits, kSlice>(chunk, v);
            out[kSlice * kAcross + v] = codes;
            if constexpr (kPairs && kSlice % 2 == 1) {
              Isa::dot(sums[v], codes + uint32_t{kPairOffset} * 0x01010101U, out[(kSlice - 1) * kAcross + v]);
            }
          });
        });
        out += kSlicesPerChunk * kAcross;
      }
      if constexpr (kPairs) {
        repeat<kVector>([&](auto v) __attribute__((always_inline)) {
          *reinterpret_cast<Ints*>(pass.pair_sums + (group * kPanels + panel) * kPanelRows + v * Isa::kLanes) = sums[v];
        });
      }
    }
  }
}

/// Calls fn with the rows of a tile as a constant, and where each begins: as many tiles of kTile code rows as fit, then
/// halves of them.
template <int kTile, int kPlanes, class Fn>
[[gnu::always_inline]] inline void for_each_tile(int64_t code_rows, const Fn& fn) {
  int64_t row = 0;
  for (; row + kTile <= code_rows; row += kTile) fn(std::integral_constant<int, kTile>{}, row);
  if constexpr (kTile > kPlanes) {
    constexpr int kHalf = kTile / kPlanes / 2 * kPlanes;
    for_each_tile<kHalf, kPlanes>(
        code_rows - row, [&](auto rows, int64_t at) __attribute__((always_inline)) { fn(rows, row + at); });
  }
}

/// Rows of a tile.
template <class Isa, TileKind kKind>
constexpr int kTileOf = kKind == TileKind::kPairs       ? Isa::kPairTileRows
                        : kKind == TileKind::kTwoPlanes ? Isa::kTwoPlaneTileRows
                        : kKind == TileKind::kGroups    ? Isa::kGroupTileRows
                                                        : Isa::kTileRows;

template <class Isa, TileKind kKind>
[[gnu::always_inline]] inline void pack_tiles(const TilePass& pass) {
  constexpr int kPlanes = planes_of(kKind);
  for_each_tile<kTileOf<Isa, kKind>, kPlanes>(
      pass.rows * kPlanes, [&](auto rows, int64_t row) __attribute__((always_inline)) {
        pack_tile<Isa, kKind == TileKind::kPairs, decltype(rows)::value>(pass, row);
      });
}

template <class Isa, TileKind kKind, int kPanels>
[[gnu::always_inline]] inline void multiply_tiles(const TilePass& pass, int64_t index) {
  constexpr int kPlanes = planes_of(kKind);
  for_each_tile<kTileOf<Isa, kKind>, kPlanes>(
      pass.rows * kPlanes, [&](auto rows, int64_t row) __attribute__((always_inline)) {
        multiply_tile<Isa, kKind, decltype(rows)::value, kPanels>(pass, row, index);
      });
}

}  // namespace baseq
