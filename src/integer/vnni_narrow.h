#pragma once

#include "vnni_kernels.h"

/// Products of few rows of activations: codes are unpacked in registers while they stream from memory.
namespace baseq {

/// One panel with kRows rows of codes, planes counted.
template <class Isa, int kBits, int kPlanes, int kRows>
[[gnu::always_inline]] inline void narrow_panel(const WeightPanels& weights, const CodeRows& x, const int32_t* offsets,
                                                int64_t index, float* y) {
  using Ints = typename Isa::Ints;
  using Floats = typename Isa::Floats;
  constexpr int kTokens = kRows / kPlanes, kVector = kVectors<Isa>;
  // So many sums of a row that their latency is hidden.
  constexpr int kChains = kRows * kVector >= 8 ? 1 : kRows * kVector >= 4 ? 2 : 4;
  const int64_t groups = weights.groups, columns = groups * weights.group_columns;
  const int64_t chunks = weights.group_columns / kChunkColumns;
  const uint8_t* stored = weights.panels + index * weights.panel_bytes;
  const uint8_t* zero_points = stored + groups * kPanelRows * bytes_of(weights.scale_type);
  const uint8_t* chunk = stored + panel_header_bytes(groups, weights.scale_type, weights.zero_points);
  for (const uint8_t* line = stored; line < chunk; line += kBlockBytes) prefetch_block(line);
  alignas(64) float total[kTokens * kPanelRows] = {};
  if (weights.up.values != nullptr) {
    vnni_factors<Isa>(weights.up, index, x.projected, kTokens, total, kPanelRows);
  }
  Floats kept[kTokens * kVector];
  repeat<kTokens * kVector>([&](auto i) __attribute__((always_inline)) {
    kept[i] = *reinterpret_cast<const Floats*>(total + i * Isa::kLanes);
  });
  for (int64_t group = 0; group < groups; ++group) {
    Ints sums[kChains * kRows * kVector];
    repeat<kRows>([&](auto r) __attribute__((always_inline)) {
      const auto start = reinterpret_cast<Ints>(Isa::broadcast(offsets + r * groups + group));
      repeat<kVector>([&](auto v) __attribute__((always_inline)) { sums[r * kVector + v] = start; });
    });
    repeat<(kChains - 1) * kRows * kVector>([&](auto i)
                                                __attribute__((always_inline)) { sums[kRows * kVector + i] = Ints{}; });
    const int8_t* codes = x.codes + group * weights.group_columns;
    for (int64_t c = 0; c < chunks; ++c, chunk += kBits * kBlockBytes, codes += kChunkColumns) {
      repeat<kBits>([&](auto block) __attribute__((always_inline)) { prefetch_block(chunk + block * kBlockBytes); });
      repeat<kSlicesPerChunk>([&](auto slice) __attribute__((always_inline)) {
        constexpr int kSlice = decltype(slice)::value;
        repeat<kVector>([&](auto v) __attribute__((always_inline)) {
          const auto bytes = unpacked<Isa, kBits, kSlice>(chunk, v);
          repeat<kRows>([&](auto r) __attribute__((always_inline)) {
            Isa::dot(sums[(kSlice % kChains * kRows + r) * kVector + v], bytes,
                     codes + r * columns + kSlice * kSliceColumns);
          });
        });
      });
    }
    repeat<kRows * kVector>([&](auto i) __attribute__((always_inline)) {
      repeat<kChains - 1>([&](auto chain) __attribute__((always_inline)) {
        sums[i] = sums[i] + sums[(chain + 1) * kRows * kVector + i];
      });
    });
    repeat<kVector>([&](auto v) __attribute__((always_inline)) {
      const int64_t at = group * kPanelRows + v * Isa::kLanes;
      const Floats scales = load_scales<Isa>(weights.scale_type, stored, at);
      if (weights.zero_points) {
        const auto zeros = reinterpret_cast<Ints>(Isa::widen_bytes(zero_points + at));
        repeat<kRows>([&](auto r) __attribute__((always_inline)) {
          sums[r * kVector + v] = sums[r * kVector + v] - zeros * x.sums[r * groups + group];
        });
      }
      repeat<kTokens>([&](auto r) __attribute__((always_inline)) {
        add_scaled<Isa, kPlanes>(sums[r * kPlanes * kVector + v], sums[(r * kPlanes + kPlanes - 1) * kVector + v],
                                 scales, x.scale + (x.scales_per_row == 1 ? r : r * groups + group),
                                 kept[r * kVector + v]);
      });
    });
  }
  repeat<kTokens * kVector>([&](auto i) __attribute__((always_inline)) {
    *reinterpret_cast<Floats*>(total + i * Isa::kLanes) = kept[i];
  });
  repeat<kTokens>([&](auto r) __attribute__((always_inline)) {
    finish_row<Isa>(weights, x, r, index, total + r * kPanelRows, y);
  });
}

}  // namespace baseq
