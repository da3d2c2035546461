#pragma once

#include <algorithm>
#include <cfloat>
#include <cstring>
#include <limits>

#include "attention_kernels.h"
#include "lanes.h"

/// Attention by blocks of one page, inlined into a version for each instruction set. A row computes the same operations
/// whatever rows it is computed with: those of the tokens that it sees, page after page.
namespace baseq {

/// Most rows of a tile.
constexpr int kTileQueries = 6;

/// The scratch memory: a page in the form that tiles read, and the rows that walk over it.
struct AttentionBlock {
  const AttentionRows& task;
  int64_t features = 0;
  int64_t first = 0, rows = 0;     ///< rows of the task
  int16_t* key_codes = nullptr;    ///< [features / 2, 64, 2]
  float* keys = nullptr;           ///< float caches: [features, 64], the same memory
  float* values = nullptr;         ///< [64, features]
  float* scores = nullptr;         ///< [kTileQueries, 64], then the weights of the values
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
/// The tokens of page `page` that row `row` of the task sees.
[[gnu::always_inline]] inline TokenRange visible_tokens(const AttentionRows& task, int64_t row, int64_t page) {
  const int64_t position = task.first_position + row / task.heads, start = page * kPageTokens;
  const int64_t oldest = task.window > 0 ? std::max<int64_t>(0, position - task.window + 1) : 0;
  return {std::clamp<int64_t>(oldest - start, 0, kPageTokens),
          std::clamp<int64_t>(position + 1 - start, 0, kPageTokens)};
}

/// Query row `row` of the block: 15 bits with one scale, or its floats times the scaling.
template <class Isa>
[[gnu::always_inline]] inline void prepare_query(const AttentionBlock& block, int64_t row) {
  using Floats = typename Isa::Floats;
  using Ints = typename Isa::Ints;
  const AttentionRows& task = block.task;
  const int64_t at = block.first + row, head_dim = task.layout.head_dim;
  alignas(64) float padded[kMaxHeadDim] = {};
  std::memcpy(padded, task.query_values + at / task.heads * task.query_stride + at % task.heads * head_dim,
              static_cast<size_t>(head_dim) * sizeof(float));
  if (!task.layout.quantized()) {
    float* to = block.queries + row * block.features;
    for (int64_t i = 0; i < block.features; i += Isa::kLanes) store<Isa>(to + i, load<Isa>(padded + i) * task.scaling);
    return;
  }
  constexpr float kLimit = 16383;
  Floats largest = {}, bad = {};
  for (int64_t i = 0; i < block.features; i += Isa::kLanes) {
    const Floats x = load<Isa>(padded + i);
    largest = larger<Isa>(largest, magnitude<Isa>(x));
    bad = bad + x * 0.0F;
  }
  const float step = std::max(largest_lane<Isa>(largest) / kLimit, FLT_MIN);
  Ints total = {};
  for (int64_t i = 0; i < block.features; i += Isa::kLanes) {
    Floats position = rounded<Isa>(load<Isa>(padded + i) / step);
    position = position < -kLimit ? Floats{} - kLimit : position;
    position = position > kLimit ? Floats{} + kLimit : position;
    const Ints code = __builtin_convertvector(position, Ints);
    total = total + code;
    for (int lane = 0; lane < Isa::kLanes; ++lane) {
      block.codes[row * block.features + i + lane] = static_cast<int16_t>(code[lane]);
    }
  }
  int32_t sum = 0;
  float not_finite = 0;
  for (int lane = 0; lane < Isa::kLanes; ++lane) {
    sum += total[lane];
    not_finite += bad[lane];
  }
  const float scale = step * task.scaling + not_finite;
  block.scale[row] = scale;
  block.sum[row] = static_cast<float>(sum) * scale;
}

/// A page of keys as int16 or float32, values as float32.
template <class Isa>
[[gnu::always_inline]] inline void unpack_page(const AttentionBlock& block, const uint8_t* page) {
  using Words = typename Isa::Words;
  const CacheLayout& layout = block.task.layout;
  const uint8_t* values = page + layout.matrix_bytes();
  const int64_t count = block.features * kPageTokens;
  if (layout.type == CachedType::kNibbles) {
    // Two features of kLanes tokens: 2 kLanes bytes.
    for (int64_t quad = 0; quad < block.features / 4; ++quad) {
      const uint8_t* stored = page + quad * kPageTokens * 2;
      auto* to = reinterpret_cast<Words*>(block.key_codes + quad * kPageTokens * 4);
      for (int64_t token = 0; token < kPageTokens; token += Isa::kLanes, ++to) {
        const Words both = Isa::widen_pairs(stored + 2 * token);
        to[0] = both & 0x000f000fU;
        to[kPageTokens / Isa::kLanes] = both >> 4 & 0x000f000fU;
      }
    }
    for (int64_t i = 0; i < count; i += 32, values += 16) {
      for (int lane = 0; lane < 16; lane += Isa::kLanes) {
        const Words both = Isa::widen_bytes(values + lane);
        store<Isa>(block.values + i + lane, as_floats<Isa>(both & 15U));
        store<Isa>(block.values + i + 16 + lane, as_floats<Isa>(both >> 4));
      }
    }
  } else if (layout.type == CachedType::kBytes) {
    auto* to = reinterpret_cast<Words*>(block.key_codes);
    for (int64_t i = 0; i < count / 2; i += Isa::kLanes, ++to) *to = Isa::widen_pairs(page + 2 * i);
    for (int64_t i = 0; i < count; i += Isa::kLanes) {
      store<Isa>(block.values + i, as_floats<Isa>(Isa::widen_bytes(values + i)));
    }
  } else if (layout.type == CachedType::kHalf) {
    for (int64_t i = 0; i < count; i += Isa::kLanes) {
      store<Isa>(block.keys + i, load_stored<Isa, StoredType::kHalf>(page, i));
      store<Isa>(block.values + i, load_stored<Isa, StoredType::kHalf>(values, i));
    }
  } else {
    std::memcpy(block.keys, page, static_cast<size_t>(count) * sizeof(float));
    std::memcpy(block.values, values, static_cast<size_t>(count) * sizeof(float));
  }
}

/// The largest power of two of registers beside each other so that kRows times as many fit.
template <class Isa, int kRows>
constexpr int kAcross = 4 * kRows <= Isa::kRegisters * 3 / 4   ? 4
                        : 2 * kRows <= Isa::kRegisters * 3 / 4 ? 2
                                                               : 1;

/// Scores of kRows rows with all tokens of the page.
template <class Isa, int kRows>
[[gnu::always_inline]] inline void score_rows(const AttentionBlock& block, int64_t row) {
  using Floats = typename Isa::Floats;
  using Ints = typename Isa::Ints;
  using Words = typename Isa::Words;
  constexpr int kWide = kAcross<Isa, kRows>;
  for (int64_t token = 0; token < kPageTokens; token += kWide * Isa::kLanes) {
    float* out = block.scores + token;
    if (!block.task.layout.quantized()) {
      Floats sums[kRows * kWide];
      repeat<kRows * kWide>([&](auto i) __attribute__((always_inline)) { sums[i] = Floats{}; });
      const float* queries = block.queries + row * block.features;
      for (int64_t k = 0; k < block.features; ++k) {
        Floats keys[kWide];
        repeat<kWide>([&](auto j) __attribute__((always_inline)) {
          keys[j] = load<Isa>(block.keys + k * kPageTokens + token + j * Isa::kLanes);
        });
        repeat<kRows>([&](auto r) __attribute__((always_inline)) {
          const Floats query = broadcast_float<Isa>(queries + r * block.features + k);
          repeat<kWide>([&](auto j) __attribute__((always_inline)) { Isa::fma(sums[r * kWide + j], query, keys[j]); });
        });
      }
      repeat<kRows * kWide>([&](auto i) __attribute__((always_inline)) {
        store<Isa>(out + i / kWide * kPageTokens + i % kWide * Isa::kLanes, sums[i]);
      });
      continue;
    }
    Ints sums[kRows * kWide];
    repeat<kRows * kWide>([&](auto i) __attribute__((always_inline)) { sums[i] = Ints{}; });
    const int16_t* codes = block.codes + row * block.features;
    for (int64_t k = 0; k < block.features; k += 2) {
      Words keys[kWide];
      repeat<kWide>([&](auto j) __attribute__((always_inline)) {
        keys[j] = *reinterpret_cast<const Words*>(block.key_codes + k * kPageTokens + 2 * (token + j * Isa::kLanes));
      });
      repeat<kRows>([&](auto r) __attribute__((always_inline)) {
        const Words query = Isa::broadcast(codes + r * block.features + k);
        repeat<kWide>([&](auto j)
                          __attribute__((always_inline)) { Isa::dot_shorts(sums[r * kWide + j], keys[j], query); });
      });
    }
    repeat<kWide>([&](auto j) __attribute__((always_inline)) {
      const Floats scale = load<Isa>(block.numbers + token + j * Isa::kLanes);
      const Floats base = load<Isa>(block.numbers + kPageTokens + token + j * Isa::kLanes);
      repeat<kRows>([&](auto r) __attribute__((always_inline)) {
        Floats score = base * block.sum[row + r];
        Isa::fma(score, __builtin_convertvector(sums[r * kWide + j], Floats), scale * block.scale[row + r]);
        store<Isa>(out + r * kPageTokens + j * Isa::kLanes, score);
      });
    });
  }
}

/// One row's scores become the weights of its values; what it has so far is scaled to the new largest score.
template <class Isa>
[[gnu::always_inline]] inline void softmax_step(const AttentionBlock& block, int64_t row, float* scores,
                                                const TokenRange& range) {
  using Floats = typename Isa::Floats;
  using Ints = typename Isa::Ints;
  constexpr int kParts = 16 / Isa::kLanes;
  const bool quantized = block.task.layout.quantized();
  const float *scale = block.numbers + 2 * kPageTokens, *base = block.numbers + 3 * kPageTokens;
  Floats largest = Floats{} - std::numeric_limits<float>::infinity();
  const auto seen = [&](int64_t token) __attribute__((always_inline)) {
    const Ints at = lane_numbers<Isa>() + static_cast<int32_t>(token);
    return (at >= static_cast<int32_t>(range.begin)) & (at < static_cast<int32_t>(range.end));
  };
  for (int64_t token = 0; token < kPageTokens; token += Isa::kLanes) {
    const Floats score = load<Isa>(scores + token);
    largest = seen(token) & (score > largest) ? score : largest;
  }
  const float before = block.largest[row], now = std::max(before, largest_lane<Isa>(largest));
  Floats weights[kParts], bases[kParts];
  repeat<kParts>([&](auto part) __attribute__((always_inline)) { weights[part] = bases[part] = Floats{}; });
  for (int64_t token = 0; token < kPageTokens; token += 16) {
    repeat<kParts>([&](auto part) __attribute__((always_inline)) {
      const int64_t at = token + part * Isa::kLanes;
      const auto mask = seen(at);
      Floats weight = exp_of_negative<Isa>(load<Isa>(scores + at) - now);
      weight = mask ? weight : Floats{};
      weights[part] = weights[part] + weight;
      if (quantized) {
        const Floats zero = {}, of_token = load<Isa>(base + at);
        Isa::fma(bases[part], weight, mask ? of_token : zero);
        weight = weight * load<Isa>(scale + at);
      }
      store<Isa>(scores + at, weight);
    });
  }
  const float kept = exp_of_negative<Isa>(Floats{} + (before - now))[0];
  block.largest[row] = now;
  block.weight[row] = __builtin_fmaf(block.weight[row], kept, sum_of_lanes<Isa>(weights));
  const Floats added = Floats{} + sum_of_lanes<Isa>(bases);
  float* out = block.out + row * block.features;
  for (int64_t i = 0; i < block.features; i += Isa::kLanes) {
    Floats value = added;
    Isa::fma(value, load<Isa>(out + i), Floats{} + kept);
    store<Isa>(out + i, value);
  }
}

/// Adds the weighted values of the tokens that kRows rows see, token after token.
template <class Isa, int kRows>
[[gnu::always_inline]] inline void add_values(const AttentionBlock& block, int64_t row, const TokenRange& range) {
  using Floats = typename Isa::Floats;
  // features is a multiple of 32: of 2 registers of 16 lanes.
  constexpr int kMost = 32 / Isa::kLanes, kWide = kAcross<Isa, kRows> < kMost ? kAcross<Isa, kRows> : kMost;
  float* out = block.out + row * block.features;
  for (int64_t first = 0; first < block.features; first += kWide * Isa::kLanes) {
    Floats sums[kRows * kWide];
    repeat<kRows * kWide>([&](auto i) __attribute__((always_inline)) {
      sums[i] = load<Isa>(out + i / kWide * block.features + first + i % kWide * Isa::kLanes);
    });
    for (int64_t token = range.begin; token < range.end; ++token) {
      Floats values[kWide];
      repeat<kWide>([&](auto j) __attribute__((always_inline)) {
        values[j] = load<Isa>(block.values + token * block.features + first + j * Isa::kLanes);
      });
      repeat<kRows>([&](auto r) __attribute__((always_inline)) {
        const Floats weight = broadcast_float<Isa>(block.scores + r * kPageTokens + token);
        repeat<kWide>([&](auto j) __attribute__((always_inline)) { Isa::fma(sums[r * kWide + j], weight, values[j]); });
      });
    }
    repeat<kRows * kWide>([&](auto i) __attribute__((always_inline)) {
      store<Isa>(out + i / kWide * block.features + first + i % kWide * Isa::kLanes, sums[i]);
    });
  }
}

template <class Isa, int kRows>
[[gnu::always_inline]] inline void attend_tile(const AttentionBlock& block, int64_t row, const TokenRange& range) {
  score_rows<Isa, kRows>(block, row);
  for (int r = 0; r < kRows; ++r) softmax_step<Isa>(block, row + r, block.scores + r * kPageTokens, range);
  add_values<Isa, kRows>(block, row, range);
}

/// All rows of the block with one page.
template <class Isa>
[[gnu::always_inline]] inline void attend_page(const AttentionBlock& block, int64_t page) {
  for (int64_t row = 0; row < block.rows;) {
    const TokenRange range = visible_tokens(block.task, block.first + row, page);
    int64_t count = 1;
    while (count < kTileQueries && row + count < block.rows &&
           visible_tokens(block.task, block.first + row + count, page) == range) {
      ++count;
    }
    if (range.begin < range.end) {
      const int64_t tile = count == 5 ? 4 : count;
      switch (tile) {
        case 6:
          attend_tile<Isa, 6>(block, row, range);
          break;
        case 4:
          attend_tile<Isa, 4>(block, row, range);
          break;
        case 3:
          attend_tile<Isa, 3>(block, row, range);
          break;
        case 2:
          attend_tile<Isa, 2>(block, row, range);
          break;
        default:
          attend_tile<Isa, 1>(block, row, range);
      }
      count = tile;
    }
    row += count;
  }
}

/// IntegerKernels::attend.
template <class Isa>
[[gnu::always_inline]] inline void attend_rows(const AttentionRows& task, void* scratch) {
  using Floats = typename Isa::Floats;
  const int64_t features = task.layout.features(), head_dim = task.layout.head_dim, rows = task.queries * task.heads;
  auto* memory = static_cast<float*>(scratch);
  AttentionBlock block{.task = task, .features = features};
  const auto take = [&](int64_t count) {
    float* result = memory;
    memory += count;
    return result;
  };
  block.keys = take(features * kPageTokens);
  block.key_codes = reinterpret_cast<int16_t*>(block.keys);
  block.values = take(features * kPageTokens);
  block.scores = take(kTileQueries * kPageTokens);
  block.queries = take(kQueryRows * features);
  block.codes = reinterpret_cast<int16_t*>(block.queries);
  block.out = take(kQueryRows * features);
  block.scale = take(kQueryRows);
  block.sum = take(kQueryRows);
  block.largest = take(kQueryRows);
  block.weight = take(kQueryRows);
  for (; block.first < rows; block.first += block.rows) {
    block.rows = std::min(kQueryRows, rows - block.first);
    for (int64_t row = 0; row < block.rows; ++row) {
      prepare_query<Isa>(block, row);
      block.largest[row] = -std::numeric_limits<float>::infinity();
      block.weight[row] = 0;
    }
    std::fill_n(block.out, block.rows * features, 0.0F);
    const int64_t newest = task.first_position + (block.first + block.rows - 1) / task.heads;
    const int64_t oldest = task.first_position + block.first / task.heads - (task.window > 0 ? task.window - 1 : 0);
    const int64_t first_page = task.window > 0 ? std::max<int64_t>(0, oldest) / kPageTokens : 0;
    for (int64_t page = first_page; page <= newest / kPageTokens; ++page) {
      const uint8_t* bytes = task.pages[page];
      block.numbers = reinterpret_cast<const float*>(bytes + 2 * task.layout.matrix_bytes());
      unpack_page<Isa>(block, bytes);
      attend_page<Isa>(block, page);
    }
    for (int64_t row = 0; row < block.rows; ++row) {
      float* values = block.out + row * features;
      const Floats inverse = Floats{} + 1.0F / block.weight[row];
      for (int64_t i = 0; i < features; i += Isa::kLanes) store<Isa>(values + i, load<Isa>(values + i) * inverse);
      const int64_t at = block.first + row;
      std::memcpy(task.out + at / task.heads * task.out_stride + at % task.heads * head_dim, values,
                  static_cast<size_t>(head_dim) * sizeof(float));
    }
  }
}

}  // namespace baseq
