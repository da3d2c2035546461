#pragma once

#include <algorithm>
#include <limits>

#include "attention_kernels.h"
#include "lanes.h"

/// Tiles of query rows with one page, inlined into a version for each instruction set. A row computes the same
/// operations whatever rows it is computed with, and wherever a tile reads the page.
namespace baseq {

/// Most rows of a tile.
constexpr int kTileQueries = 6;
/// Up to so many rows unpack a page in registers.
constexpr int kPackedRows = 4;

/// Where tiles read a page. Many rows share one that was unpacked before; a few unpack it in registers.
enum class PageForm : uint8_t { kUnpackedCodes, kUnpackedFloats, kNibbles, kBytes, kHalf };
constexpr bool has_codes(PageForm form) { return form != PageForm::kUnpackedFloats && form != PageForm::kHalf; }
constexpr bool is_packed(PageForm form) {
  return form != PageForm::kUnpackedCodes && form != PageForm::kUnpackedFloats;
}

/// Rows that walk over the pages, and the scratch memory for it.
struct AttentionBlock {
  const AttentionRows& task;
  int64_t features = 0;
  int64_t first = 0, rows = 0;     ///< rows of the task
  const uint8_t* page = nullptr;   ///< as it is stored
  int16_t* key_codes = nullptr;    ///< unpacked: [features / 2, 64, 2]
  const float* keys = nullptr;     ///< unpacked, of float caches: [features, 64]
  const float* values = nullptr;   ///< unpacked: [64, features]
  float* key_memory = nullptr;     ///< of `key_codes` or `keys`
  float* value_memory = nullptr;   ///< of `values`
  float* scores = nullptr;         ///< [kTileQueries, 64], then the weights of the values
  uint32_t* seen = nullptr;        ///< [64]: all bits of the tokens that the tile sees
  const float* numbers = nullptr;  ///< the page's key scale and base, value scale and base
  int16_t* codes = nullptr;        ///< queries [rows, features]
  float* queries = nullptr;        ///< float caches: times the scaling, the same memory
  float* scale = nullptr;          ///< [rows], times the scaling
  float* sum = nullptr;            ///< [rows]: the query's sum
  float* largest = nullptr;        ///< [rows]: the largest score so far
  float* weight = nullptr;         ///< [rows]: the sum of the weights so far
  float* out = nullptr;            ///< [rows, features]
};

struct TokenRange {
  int64_t begin = 0, end = 0;
  bool operator==(const TokenRange&) const = default;
};

/// What a softmax step does to the output of the rows of a tile before values are added: o * kept + added.
struct OutputSteps {
  alignas(64) float kept[16] = {};
  alignas(64) float added[16] = {};
};

/// float16 values from i on, infinities and NaN too.
template <class Isa>
[[gnu::always_inline]] inline typename Isa::Floats half_values(const void* values, int64_t i) {
  return Isa::widen_halves(static_cast<const uint16_t*>(values) + i);
}

/// The largest power of two of registers beside each other so that kRows times as many fit.
template <class Isa, int kRows>
constexpr int kAcross = 4 * kRows <= Isa::kRegisters * 3 / 4   ? 4
                        : 2 * kRows <= Isa::kRegisters * 3 / 4 ? 2
                                                               : 1;

/// Four features of kWide registers of tokens, as pairs of int16: features 0 and 1, then 2 and 3.
template <class Isa, PageForm kForm, int kWide>
[[gnu::always_inline]] inline void load_key_codes(const AttentionBlock& block, int64_t feature, int64_t token,
                                                  typename Isa::Words* keys) {
  using Words = typename Isa::Words;
  repeat<kWide>([&](auto j) __attribute__((always_inline)) {
    const int64_t at = 2 * (token + j * Isa::kLanes);
    if constexpr (kForm == PageForm::kNibbles) {
      const Words both = Isa::widen_pairs(block.page + feature / 4 * kPageTokens * 2 + at);
      keys[j] = both & 0x000f000fU;
      keys[kWide + j] = both >> 4 & 0x000f000fU;
    } else if constexpr (kForm == PageForm::kBytes) {
      keys[j] = Isa::widen_pairs(block.page + feature * kPageTokens + at);
      keys[kWide + j] = Isa::widen_pairs(block.page + (feature + 2) * kPageTokens + at);
    } else {
      keys[j] = *reinterpret_cast<const Words*>(block.key_codes + feature * kPageTokens + at);
      keys[kWide + j] = *reinterpret_cast<const Words*>(block.key_codes + (feature + 2) * kPageTokens + at);
    }
  });
}

/// Scores of kRows rows with kWide registers of tokens.
template <class Isa, PageForm kForm, int kRows, int kWide>
[[gnu::always_inline]] inline void score_codes(const AttentionBlock& block, int64_t row, int64_t token) {
  using Floats = typename Isa::Floats;
  using Ints = typename Isa::Ints;
  using Words = typename Isa::Words;
  Ints sums[kRows * kWide];
  repeat<kRows * kWide>([&](auto i) __attribute__((always_inline)) { sums[i] = Ints{}; });
  const int16_t* codes = block.codes + row * block.features;
  for (int64_t k = 0; k < block.features; k += 4) {
    Words keys[2 * kWide];
    load_key_codes<Isa, kForm, kWide>(block, k, token, keys);
    repeat<2>([&](auto pair) __attribute__((always_inline)) {
      repeat<kRows>([&](auto r) __attribute__((always_inline)) {
        const Words query = Isa::broadcast(codes + r * block.features + k + 2 * pair);
        repeat<kWide>([&](auto j) __attribute__((always_inline)) {
          Isa::dot_shorts(sums[r * kWide + j], keys[pair * kWide + j], query);
        });
      });
    });
  }
  repeat<kWide>([&](auto j) __attribute__((always_inline)) {
    const Floats scale = load<Isa>(block.numbers + token + j * Isa::kLanes);
    const Floats base = load<Isa>(block.numbers + kPageTokens + token + j * Isa::kLanes);
    repeat<kRows>([&](auto r) __attribute__((always_inline)) {
      Floats score = base * block.sum[row + r];
      Isa::fma(score, __builtin_convertvector(sums[r * kWide + j], Floats), scale * block.scale[row + r]);
      store<Isa>(block.scores + token + r * kPageTokens + j * Isa::kLanes, score);
    });
  });
}

template <class Isa, PageForm kForm, int kRows, int kWide>
[[gnu::always_inline]] inline void score_floats(const AttentionBlock& block, int64_t row, int64_t token) {
  using Floats = typename Isa::Floats;
  Floats sums[kRows * kWide];
  repeat<kRows * kWide>([&](auto i) __attribute__((always_inline)) { sums[i] = Floats{}; });
  const float* queries = block.queries + row * block.features;
  for (int64_t k = 0; k < block.features; ++k) {
    Floats keys[kWide];
    repeat<kWide>([&](auto j) __attribute__((always_inline)) {
      const int64_t at = k * kPageTokens + token + j * Isa::kLanes;
      keys[j] = kForm == PageForm::kHalf ? half_values<Isa>(block.page, at) : load<Isa>(block.keys + at);
    });
    repeat<kRows>([&](auto r) __attribute__((always_inline)) {
      const Floats query = broadcast_float<Isa>(queries + r * block.features + k);
      repeat<kWide>([&](auto j) __attribute__((always_inline)) { Isa::fma(sums[r * kWide + j], query, keys[j]); });
    });
  }
  repeat<kRows * kWide>([&](auto i) __attribute__((always_inline)) {
    store<Isa>(block.scores + token + i / kWide * kPageTokens + i % kWide * Isa::kLanes, sums[i]);
  });
}

/// Scores of kRows rows with the tokens that they see and some beside those.
template <class Isa, PageForm kForm, int kRows>
[[gnu::always_inline]] inline void score_rows(const AttentionBlock& block, int64_t row, const TokenRange& range) {
  constexpr int kWide = is_packed(kForm) ? kAcross<Isa, kRows + 1> : kAcross<Isa, kRows>;
  constexpr int64_t kTokens = int64_t{kWide} * Isa::kLanes;
  for (int64_t token = range.begin / kTokens * kTokens; token < range.end; token += kTokens) {
    if constexpr (has_codes(kForm)) {
      score_codes<Isa, kForm, kRows, kWide>(block, row, token);
    } else {
      score_floats<Isa, kForm, kRows, kWide>(block, row, token);
    }
  }
}

/// The scores of `rows` rows, kMost at most, become the weights of their values.
template <class Isa, bool kCodes, int kMost>
[[gnu::always_inline]] inline void softmax_step(const AttentionBlock& block, int64_t row, int64_t rows,
                                                OutputSteps& steps) {
  using Floats = typename Isa::Floats;
  using Words = typename Isa::Words;
  constexpr int kParts = 16 / Isa::kLanes;
  const float *scale = block.numbers + 2 * kPageTokens, *base = block.numbers + 3 * kPageTokens;
  const auto hidden = reinterpret_cast<Words>(Floats{} - std::numeric_limits<float>::infinity());
  Floats highest[kMost] = {}, totals[2 * kMost] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const float* scores = block.scores + r * kPageTokens;
    Floats largest = reinterpret_cast<Floats>(hidden);
    for (int64_t token = 0; token < kPageTokens; token += Isa::kLanes) {
      const Words seen = *reinterpret_cast<const Words*>(block.seen + token);
      const Words score = *reinterpret_cast<const Words*>(scores + token);
      largest = larger<Isa>(largest, reinterpret_cast<Floats>((score & seen) | (hidden & ~seen)));
    }
    highest[r] = largest;
  }
  alignas(64) float largest[16], sums[16];
  across_lanes<Isa, kMost>(
      highest, largest,
      [](const Floats& a, const Floats& b) __attribute__((always_inline)) { return larger<Isa>(a, b); });
  for (int64_t r = 0; r < rows; ++r) {
    float* scores = block.scores + r * kPageTokens;
    const float before = block.largest[row + r], now = std::max(before, largest[r]);
    steps.kept[r] = before - now;
    block.largest[row + r] = now;
    Floats weights[kParts] = {}, bases[kParts] = {};
    for (int64_t token = 0; token < kPageTokens; token += 16) {
      repeat<kParts>([&](auto part) __attribute__((always_inline)) {
        const int64_t at = token + part * Isa::kLanes;
        const Words seen = *reinterpret_cast<const Words*>(block.seen + at);
        Floats weight = exp_of_negative<Isa>(load<Isa>(scores + at) - now);
        weight = reinterpret_cast<Floats>(reinterpret_cast<Words>(weight) & seen);
        weights[part] = weights[part] + weight;
        if constexpr (kCodes) {
          const Words of_token = *reinterpret_cast<const Words*>(base + at);
          Isa::fma(bases[part], weight, reinterpret_cast<Floats>(of_token & seen));
          weight = weight * load<Isa>(scale + at);
        }
        store<Isa>(scores + at, weight);
      });
    }
    totals[r] = in_one_register<Isa>(weights);
    totals[kMost + r] = in_one_register<Isa>(bases);
  }
  across_lanes<Isa, 2 * kMost>(
      totals, sums, [](const Floats& a, const Floats& b) __attribute__((always_inline)) { return a + b; });
  for (int64_t i = 0; i < kMost; i += Isa::kLanes) {
    store<Isa>(steps.kept + i, exp_of_negative<Isa>(load<Isa>(steps.kept + i)));
  }
  for (int64_t r = 0; r < rows; ++r) {
    block.weight[row + r] = __builtin_fmaf(block.weight[row + r], steps.kept[r], sums[r]);
    steps.added[r] = sums[kMost + r];
  }
}

/// Values of kUnits pairs of registers, which hold the features i and i + 16 of 32 features, from unit `unit` on.
template <class Isa, PageForm kForm, int kUnits>
[[gnu::always_inline]] inline void load_values(const AttentionBlock& block, int64_t token, int64_t unit,
                                               typename Isa::Floats* values) {
  using Words = typename Isa::Words;
  constexpr int64_t kParts = 16 / Isa::kLanes;
  repeat<kUnits>([&](auto u) __attribute__((always_inline)) {
    const int64_t at = (unit + u) / kParts * 32 + (unit + u) % kParts * Isa::kLanes, from = token * block.features + at;
    const uint8_t* stored = block.page + block.task.layout.matrix_bytes();
    if constexpr (kForm == PageForm::kNibbles) {
      const Words both = Isa::widen_bytes(stored + (token * block.features + at / 32 * 32) / 2 + at % 32);
      values[2 * u] = as_floats<Isa>(both & 15U);
      values[2 * u + 1] = as_floats<Isa>(both >> 4);
    } else {
      repeat<2>([&](auto half) __attribute__((always_inline)) {
        const int64_t i = from + 16 * half;
        values[2 * u + half] = kForm == PageForm::kBytes  ? as_floats<Isa>(Isa::widen_bytes(stored + i))
                               : kForm == PageForm::kHalf ? half_values<Isa>(stored, i)
                                                          : load<Isa>(block.values + i);
      });
    }
  });
}

/// Adds the weighted values of the tokens that kRows rows see, token after token, to kUnits pairs of registers.
template <class Isa, PageForm kForm, int kRows, int kUnits>
[[gnu::always_inline]] inline void add_units(const AttentionBlock& block, int64_t row, const TokenRange& range,
                                             const OutputSteps& steps, int64_t unit) {
  using Floats = typename Isa::Floats;
  constexpr int kWide = 2 * kUnits;
  constexpr int64_t kParts = 16 / Isa::kLanes;
  const auto place = [&](int r, int j) __attribute__((always_inline)) {
    const int64_t u = unit + j / 2;
    return block.out + (row + r) * block.features + u / kParts * 32 + u % kParts * Isa::kLanes + j % 2 * 16;
  };
  Floats sums[kRows * kWide];
  repeat<kRows * kWide>([&](auto i) __attribute__((always_inline)) {
    sums[i] = broadcast_float<Isa>(steps.added + i / kWide);
    Isa::fma(sums[i], load<Isa>(place(i / kWide, i % kWide)), steps.kept + i / kWide);
  });
  for (int64_t token = range.begin; token < range.end; ++token) {
    Floats values[kWide];
    load_values<Isa, kForm, kUnits>(block, token, unit, values);
    repeat<kRows>([&](auto r) __attribute__((always_inline)) {
      const Floats weight = broadcast_float<Isa>(block.scores + r * kPageTokens + token);
      repeat<kWide>([&](auto j) __attribute__((always_inline)) { Isa::fma(sums[r * kWide + j], weight, values[j]); });
    });
  }
  repeat<kRows * kWide>([&](auto i)
                            __attribute__((always_inline)) { store<Isa>(place(i / kWide, i % kWide), sums[i]); });
}

template <class Isa, PageForm kForm, int kRows>
[[gnu::always_inline]] inline void add_values(const AttentionBlock& block, int64_t row, const TokenRange& range,
                                              const OutputSteps& steps) {
  constexpr int kUnits = kAcross<Isa, kRows> == 4 ? 2 : 1;
  const int64_t units = block.features / (2 * Isa::kLanes);
  int64_t unit = 0;
  for (; unit + kUnits <= units; unit += kUnits) add_units<Isa, kForm, kRows, kUnits>(block, row, range, steps, unit);
  if constexpr (kUnits > 1) {
    for (; unit < units; ++unit) add_units<Isa, kForm, kRows, 1>(block, row, range, steps, unit);
  }
}

/// fn with `rows` as a constant: 1 to 4, or 6 where pages were unpacked.
template <PageForm kForm, class Fn>
[[gnu::always_inline]] inline void with_rows(int64_t rows, const Fn& fn) {
  switch (rows) {
    case 1:
      return fn(std::integral_constant<int, 1>{});
    case 2:
      return fn(std::integral_constant<int, 2>{});
    case 3:
      return fn(std::integral_constant<int, 3>{});
    case 4:
      return fn(std::integral_constant<int, 4>{});
    default:
      if constexpr (!is_packed(kForm)) fn(std::integral_constant<int, kTileQueries>{});
  }
}

/// `rows` rows with the tokens of `range`.
template <class Isa, PageForm kForm>
[[gnu::always_inline]] inline void attend_tile(const AttentionBlock& block, int64_t row, int64_t rows,
                                               const TokenRange& range) {
  with_rows<kForm>(
      rows, [&](auto r)
                __attribute__((always_inline)) { score_rows<Isa, kForm, decltype(r)::value>(block, row, range); });
  for (int64_t token = 0; token < kPageTokens; ++token) {
    block.seen[token] = token >= range.begin && token < range.end ? ~0U : 0U;
  }
  OutputSteps steps;
  softmax_step<Isa, has_codes(kForm), is_packed(kForm) ? kPackedRows : kTileQueries>(block, row, rows, steps);
  with_rows<kForm>(
      rows, [&](auto r) __attribute__((always_inline)) {
        add_values<Isa, kForm, decltype(r)::value>(block, row, range, steps);
      });
}

}  // namespace baseq
