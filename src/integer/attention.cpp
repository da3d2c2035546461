#include "attention.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>

#include "../quant/grid.h"
#include "rounding.h"

namespace baseq {
namespace {

constexpr std::align_val_t kPageAlignment{64};

/// Where feature `feature` of token `token` of a page lies: its byte, and the bits to the right of it.
struct Place {
  int64_t at;
  int shift = 0;
};
Place key_place(CachedType type, int64_t token, int64_t feature) {
  switch (type) {
    case CachedType::kNibbles:
      return {(feature / 4 * kPageTokens + token) * 2 + feature % 2, feature % 4 >= 2 ? 4 : 0};
    case CachedType::kBytes:
      return {(feature / 2 * kPageTokens + token) * 2 + feature % 2};
    default:
      return {feature * kPageTokens + token};
  }
}
Place value_place(CachedType type, int64_t features, int64_t token, int64_t feature) {
  if (type != CachedType::kNibbles) return {token * features + feature};
  return {(token * features + feature / 32 * 32) / 2 + feature % 16, feature % 32 >= 16 ? 4 : 0};
}

/// The numbers of a page: scales and bases of its keys, then of its values.
float* numbers_of(uint8_t* page, const CacheLayout& layout, bool keys) {
  return reinterpret_cast<float*>(page + 2 * layout.matrix_bytes()) + (keys ? 0 : 2 * kPageTokens);
}

AttentionRows rows_of(const AttentionRequest& request) {
  TORCH_CHECK(request.cache != nullptr && request.rows >= 0 && request.heads >= 1 && request.first_position >= 0 &&
                  request.first_position + request.rows <= request.cache->length(),
              "attend: ", request.rows, " queries of ", request.heads, " heads from position ", request.first_position,
              " on, but the cache holds ", request.cache != nullptr ? request.cache->length() : 0, " tokens");
  return {.layout = request.cache->layout(),
          .pages = request.cache->pages().data(),
          .queries = request.rows,
          .heads = request.heads,
          .query_values = request.queries,
          .out = request.out,
          .query_stride = request.query_stride,
          .out_stride = request.out_stride,
          .first_position = request.first_position,
          .window = request.window,
          .scaling = static_cast<float>(request.scaling)};
}

/// Queries [first, first + count) of a task.
AttentionRows part_of(AttentionRows rows, int64_t first, int64_t count) {
  rows.query_values += first * rows.query_stride;
  rows.out += first * rows.out_stride;
  rows.first_position += first;
  rows.queries = count;
  return rows;
}

/// The queries in blocks that walk the pages together. Early ones see few tokens: each is followed by a late one, so
/// that threads that share the list share the work.
void append_tasks(const AttentionRows& rows, std::vector<AttentionRows>& tasks) {
  const int64_t queries = std::max<int64_t>(1, kQueryRows / rows.heads), count = (rows.queries + queries - 1) / queries;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t block = i % 2 == 0 ? i / 2 : count - 1 - i / 2, first = block * queries;
    tasks.push_back(part_of(rows, first, std::min(queries, rows.queries - first)));
  }
}

}  // namespace

int64_t attention_scratch_bytes(const AttentionRows& task) {
  const int64_t features = task.layout.features(), rows = rows_of_block(task);
  return 4 * (2 * features * kPageTokens + 8 * kPageTokens + 2 * rows * features + 4 * rows);
}

void HeadCache::Free::operator()(uint8_t* page) const { ::operator delete[](page, kPageAlignment); }

HeadCache::HeadCache(int64_t head_dim, const std::optional<QuantSpec>& grid, at::ScalarType dtype) : grid_(grid) {
  TORCH_CHECK(head_dim > 0 && head_dim <= kMaxHeadDim, "HeadCache: heads of ", head_dim, " features, expected 1 to ",
              kMaxHeadDim);
  TORCH_CHECK(dtype == at::kHalf || dtype == at::kFloat, "HeadCache: dtype is ", dtype,
              ", expected float16 or float32");
  layout_ = {head_dim, dtype == at::kHalf ? CachedType::kHalf : CachedType::kFloat};
  if (!grid) return;
  check_spec("HeadCache", *grid);
  TORCH_CHECK(grid->dynamic && grid->strategy != Strategy::kTensor, "HeadCache: expected a dynamic grid per token");
  layout_.type = grid->num_bits <= 4 ? CachedType::kNibbles : CachedType::kBytes;
}

int64_t HeadCache::bytes() const { return static_cast<int64_t>(storage_.size()) * layout_.page_bytes(); }

void HeadCache::reserve(int64_t tokens) {
  while (static_cast<int64_t>(storage_.size()) * kPageTokens < tokens) {
    const auto size = static_cast<size_t>(layout_.page_bytes());
    storage_.emplace_back(new (kPageAlignment) uint8_t[size]());
    page_starts_.push_back(storage_.back().get());
  }
}

void HeadCache::append(const Rows& keys, const Rows& values, int64_t tokens, float key_clip, float value_clip) {
  reserve(length_ + tokens);
  for (int64_t i = 0; i < tokens; ++i, ++length_) {
    const float *key = keys.values + i * keys.stride, *value = values.values + i * values.stride;
    if (grid_) {
      append_codes(key, key_clip, true);
      append_codes(value, value_clip, false);
    } else {
      append_floats(key, true);
      append_floats(value, false);
    }
  }
}

void HeadCache::append_codes(const float* token, float clip, bool key) {
  const int64_t head_dim = layout_.head_dim, features = layout_.features(), at = length_ % kPageTokens;
  const bool finite = all_finite(token, head_dim);
  const Grid grid = grid_over(find_range(token, head_dim), clip, *grid_).grid;
  uint8_t* stored = page(length_);
  float* numbers = numbers_of(stored, layout_, key);
  // Codes of symmetric grids count from the lowest one here.
  const float offset = grid_->symmetric ? -grid.low : 0;
  constexpr float kNone = std::numeric_limits<float>::quiet_NaN();
  numbers[at] = finite ? grid.scale : kNone;
  numbers[kPageTokens + at] = finite ? grid.base - offset * grid.scale : kNone;
  uint8_t codes[kMaxHeadDim] = {};
  if (finite) round_to_grid(token, head_dim, grid, -offset, reinterpret_cast<int8_t*>(codes));
  if (!key) {
    uint8_t* out = stored + layout_.matrix_bytes();
    if (layout_.type == CachedType::kBytes) {
      std::memcpy(out + at * features, codes, static_cast<size_t>(features));
      return;
    }
    out += at * features / 2;
    for (int64_t i = 0; i < features; i += 32, out += 16) {
      for (int64_t k = 0; k < 16; ++k) out[k] = static_cast<uint8_t>(codes[i + k] | codes[i + 16 + k] << 4);
    }
    return;
  }
  const int64_t step = layout_.type == CachedType::kNibbles ? 4 : 2;
  uint8_t* out = stored + 2 * at;
  for (int64_t i = 0; i < features; i += step, out += 2 * kPageTokens) {
    for (int64_t k = 0; k < 2; ++k) {
      out[k] = static_cast<uint8_t>(step == 4 ? codes[i + k] | codes[i + 2 + k] << 4 : codes[i + k]);
    }
  }
}

void HeadCache::append_floats(const float* token, bool key) {
  const int64_t at = length_ % kPageTokens;
  uint8_t* stored = page(length_) + (key ? 0 : layout_.matrix_bytes());
  for (int64_t i = 0; i < layout_.head_dim; ++i) {
    const int64_t to = (key ? key_place(layout_.type, at, i) : value_place(layout_.type, layout_.features(), at, i)).at;
    if (layout_.type == CachedType::kHalf) {
      reinterpret_cast<uint16_t*>(stored)[to] = c10::Half(token[i]).x;
    } else {
      reinterpret_cast<float*>(stored)[to] = token[i];
    }
  }
}

void HeadCache::truncate(int64_t length) {
  TORCH_CHECK(length >= 0 && length <= length_, "HeadCache: cannot keep ", length, " tokens of ", length_);
  length_ = length;
  const auto pages = static_cast<size_t>((length + kPageTokens - 1) / kPageTokens);
  storage_.resize(pages);
  page_starts_.resize(pages);
}

Tensor HeadCache::dequantized(bool keys) const {
  const Tensor result = at::empty({length_, layout_.head_dim}, at::kFloat);
  auto* out = result.mutable_data_ptr<float>();
  for (int64_t token = 0; token < length_; ++token) {
    uint8_t* page = storage_[static_cast<size_t>(token / kPageTokens)].get();
    const uint8_t* stored = page + (keys ? 0 : layout_.matrix_bytes());
    const int64_t at = token % kPageTokens;
    for (int64_t i = 0; i < layout_.head_dim; ++i, ++out) {
      const Place place = keys ? key_place(layout_.type, at, i) : value_place(layout_.type, layout_.features(), at, i);
      if (layout_.type == CachedType::kHalf) {
        const auto* halves = reinterpret_cast<const uint16_t*>(stored);
        *out = static_cast<float>(c10::Half(halves[place.at], c10::Half::from_bits()));
      } else if (layout_.type == CachedType::kFloat) {
        *out = reinterpret_cast<const float*>(stored)[place.at];
      } else {
        const float* numbers = numbers_of(page, layout_, keys);
        const int code = stored[place.at] >> place.shift & (layout_.type == CachedType::kNibbles ? 15 : 255);
        *out = static_cast<float>(code) * numbers[at] + numbers[kPageTokens + at];
      }
    }
  }
  return result;
}

Tensor HeadCache::dequantized_keys() const { return dequantized(true); }
Tensor HeadCache::dequantized_values() const { return dequantized(false); }

void attend(const AttentionRequest& request, const IntegerKernels& kernels) { attend(std::span(&request, 1), kernels); }

void attend(std::span<const AttentionRequest> requests, const IntegerKernels& kernels) {
  std::vector<AttentionRows> tasks;
  int64_t bytes = 0;
  for (const AttentionRequest& request : requests) append_tasks(rows_of(request), tasks);
  for (const AttentionRows& task : tasks) bytes = std::max(bytes, attention_scratch_bytes(task));
  at::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    const Tensor scratch = at::detail::empty_cpu({bytes}, at::kByte);
    for (int64_t i = begin; i < end; ++i) kernels.attend(tasks[static_cast<size_t>(i)], scratch.mutable_data_ptr());
  });
}

}  // namespace baseq
