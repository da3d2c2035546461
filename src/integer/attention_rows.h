#pragma once

#include <cfloat>
#include <cstring>

#include "attention_tiles.h"

/// Attention by blocks of rows that walk the pages together, inlined into a version for each instruction set.
namespace baseq {

/// The tokens of page `page` that the query of row `row` of the task sees.
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
  alignas(64) float padded[kMaxHeadDim];
  std::memcpy(padded, task.query_values + at / task.heads * task.query_stride + at % task.heads * head_dim,
              static_cast<size_t>(head_dim) * sizeof(float));
  std::fill(padded + head_dim, padded + block.features, 0.0F);
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
  int16_t* codes = block.codes + row * block.features;
  for (int64_t i = 0; i < block.features; i += Isa::kLanes) {
    Floats position = rounded<Isa>(load<Isa>(padded + i) / step);
    position = position < -kLimit ? Floats{} - kLimit : position;
    position = position > kLimit ? Floats{} + kLimit : position;
    const Ints code = __builtin_convertvector(position, Ints);
    total = total + code;
    *reinterpret_cast<typename Isa::Shorts*>(codes + i) = __builtin_convertvector(code, typename Isa::Shorts);
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

/// The block's page with keys as int16 or float32 and values as float32.
template <class Isa>
[[gnu::always_inline]] inline void unpack_page(const AttentionBlock& block) {
  using Words = typename Isa::Words;
  const CacheLayout& layout = block.task.layout;
  const uint8_t *keys = block.page, *values = keys + layout.matrix_bytes();
  const int64_t count = block.features * kPageTokens;
  float* floats = block.value_memory;
  if (layout.type == CachedType::kNibbles) {
    // Two features of kLanes tokens: 2 kLanes bytes.
    for (int64_t quad = 0; quad < block.features / 4; ++quad) {
      auto* to = reinterpret_cast<Words*>(block.key_codes + quad * kPageTokens * 4);
      for (int64_t token = 0; token < kPageTokens; token += Isa::kLanes, ++to) {
        const Words both = Isa::widen_pairs(keys + 2 * (quad * kPageTokens + token));
        to[0] = both & 0x000f000fU;
        to[kPageTokens / Isa::kLanes] = both >> 4 & 0x000f000fU;
      }
    }
    for (int64_t i = 0; i < count; i += 32, values += 16) {
      for (int lane = 0; lane < 16; lane += Isa::kLanes) {
        const Words both = Isa::widen_bytes(values + lane);
        store<Isa>(floats + i + lane, as_floats<Isa>(both & 15U));
        store<Isa>(floats + i + 16 + lane, as_floats<Isa>(both >> 4));
      }
    }
  } else if (layout.type == CachedType::kBytes) {
    auto* to = reinterpret_cast<Words*>(block.key_codes);
    for (int64_t i = 0; i < count / 2; i += Isa::kLanes, ++to) *to = Isa::widen_pairs(keys + 2 * i);
    for (int64_t i = 0; i < count; i += Isa::kLanes) {
      store<Isa>(floats + i, as_floats<Isa>(Isa::widen_bytes(values + i)));
    }
  } else {
    for (int64_t i = 0; i < count; i += Isa::kLanes) {
      store<Isa>(block.key_memory + i, half_values<Isa>(keys, i));
      store<Isa>(floats + i, half_values<Isa>(values, i));
    }
  }
}

/// All rows of the block with page `page`.
template <class Isa, PageForm kForm>
[[gnu::always_inline]] inline void attend_page(const AttentionBlock& block, int64_t page) {
  const auto range_of = [&](int64_t row) { return visible_tokens(block.task, block.first + row, page); };
  const TokenRange of_last = range_of(block.rows - 1);
  for (int64_t first = 0; first < block.rows;) {
    const TokenRange range = range_of(first);
    int64_t end = block.rows;
    if (range != of_last) {
      for (end = first + 1; range_of(end) == range;) ++end;
    }
    for (int64_t row = first; range.begin < range.end && row < end;) {
      const int64_t left = end - row, rows = left >= kTileQueries ? kTileQueries : std::min<int64_t>(left, 4);
      attend_tile<Isa, kForm>(block, row, rows, range);
      row += rows;
    }
    first = end;
  }
}

/// The pages that rows of the block see, the oldest first.
template <class Isa, PageForm kForm>
[[gnu::always_inline]] inline void attend_pages(AttentionBlock& block) {
  const AttentionRows& task = block.task;
  const CacheLayout& layout = task.layout;
  const int64_t newest = task.first_position + (block.first + block.rows - 1) / task.heads;
  const int64_t oldest = task.first_position + block.first / task.heads - (task.window > 0 ? task.window - 1 : 0);
  const int64_t first_page = task.window > 0 ? std::max<int64_t>(0, oldest) / kPageTokens : 0;
  for (int64_t page = first_page; page <= newest / kPageTokens; ++page) {
    block.page = task.pages[page];
    block.numbers = reinterpret_cast<const float*>(block.page + 2 * layout.matrix_bytes());
    if (layout.type == CachedType::kFloat) {
      block.keys = reinterpret_cast<const float*>(block.page);
      block.values = reinterpret_cast<const float*>(block.page + layout.matrix_bytes());
    } else if constexpr (!is_packed(kForm)) {
      unpack_page<Isa>(block);
    }
    if (page < newest / kPageTokens) {
      // The processor's own prefetching stops at the end of a page.
      const uint8_t* next = task.pages[page + 1];
      for (int64_t i = 0; i < layout.page_bytes(); i += 64) __builtin_prefetch(next + i);
    }
    attend_page<Isa, kForm>(block, page);
  }
}

template <class Isa>
[[gnu::always_inline]] inline void attend_block(AttentionBlock& block) {
  const bool packed = block.rows <= kPackedRows;
  switch (block.task.layout.type) {
    case CachedType::kNibbles:
      if (packed) return attend_pages<Isa, PageForm::kNibbles>(block);
      return attend_pages<Isa, PageForm::kUnpackedCodes>(block);
    case CachedType::kBytes:
      if (packed) return attend_pages<Isa, PageForm::kBytes>(block);
      return attend_pages<Isa, PageForm::kUnpackedCodes>(block);
    case CachedType::kHalf:
      if (packed) return attend_pages<Isa, PageForm::kHalf>(block);
      return attend_pages<Isa, PageForm::kUnpackedFloats>(block);
    case CachedType::kFloat:
      return attend_pages<Isa, PageForm::kUnpackedFloats>(block);
  }
}

/// IntegerKernels::attend.
template <class Isa>
[[gnu::always_inline]] inline void attend_rows(const AttentionRows& task, void* scratch) {
  using Floats = typename Isa::Floats;
  const int64_t features = task.layout.features(), head_dim = task.layout.head_dim, rows = task.queries * task.heads;
  const int64_t most = rows_of_block(task);
  auto* memory = static_cast<float*>(scratch);
  AttentionBlock block{.task = task, .features = features};
  const auto take = [&](int64_t count) {
    float* result = memory;
    memory += count;
    return result;
  };
  block.keys = block.key_memory = take(features * kPageTokens);
  block.key_codes = reinterpret_cast<int16_t*>(block.key_memory);
  block.values = block.value_memory = take(features * kPageTokens);
  block.scores = take(kTileQueries * kPageTokens);
  block.seen = reinterpret_cast<uint32_t*>(take(kPageTokens));
  block.queries = take(most * features);
  block.codes = reinterpret_cast<int16_t*>(block.queries);
  block.out = take(most * features);
  block.scale = take(most);
  block.sum = take(most);
  block.largest = take(most);
  block.weight = take(most);
  for (; block.first < rows; block.first += block.rows) {
    block.rows = std::min(most, rows - block.first);
    for (int64_t row = 0; row < block.rows; ++row) {
      prepare_query<Isa>(block, row);
      block.largest[row] = -std::numeric_limits<float>::infinity();
      block.weight[row] = 0;
    }
    std::fill_n(block.out, block.rows * features, 0.0F);
    attend_block<Isa>(block);
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
