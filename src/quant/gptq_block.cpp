#include "gptq_block.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

// Vectors as arguments, of functions that are all inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace baseq {
namespace {

constexpr int64_t kLanes = 16, kParts = kRowsInStrip / kLanes;
// The compiler splits these vectors where registers are shorter.
using Lanes = float __attribute__((vector_size(64), aligned(4), may_alias));
using IntLanes = int32_t __attribute__((vector_size(64), aligned(4), may_alias));
using Bytes = int8_t __attribute__((vector_size(16), aligned(1), may_alias));

/// Adding and taking away 1.5 * 2^23 rounds |x| < 2^22 to the nearest integer, halves to even.
constexpr float kRounder = 12582912.0F;

[[gnu::always_inline]] inline const Lanes& lanes(const float* values) {
  return *reinterpret_cast<const Lanes*>(values);
}
[[gnu::always_inline]] inline Lanes& lanes(float* values) { return *reinterpret_cast<Lanes*>(values); }

/// One column of one strip. All pointers are to its first row.
struct Column {
  float* target;
  const float* corrected;
  const float* scale;
  const float* zero_point;  ///< null: none
  int8_t* code;
  float pivot, added, low, high;
  float pulled, forgotten;  ///< shares of the distance from the target
};

/// Adds what the `count` columns before this one left to make up for, and rounds. The quotient is the one of
/// quantize().
/// @param errors [count, kRowsInStrip] of the columns before; the column's own are written behind them
/// @param shares [count]
template <bool kFirstOrder>
[[gnu::always_inline]] inline void round_column(const Column& column, const float* shares, int64_t count,
                                                float* __restrict errors, Lanes& loss) {
  static_assert(kParts == 4);
  const float* from = column.corrected;
  Lanes part0 = lanes(from), part1 = lanes(from + kLanes), part2 = lanes(from + 2 * kLanes),
        part3 = lanes(from + 3 * kLanes);
  for (int64_t i = 0; i < count; ++i) {
    const float share = shares[i];
    const float* error = errors + i * kRowsInStrip;
    part0 += share * lanes(error);
    part1 += share * lanes(error + kLanes);
    part2 += share * lanes(error + 2 * kLanes);
    part3 += share * lanes(error + 3 * kLanes);
  }
  Lanes parts[kParts] = {part0, part1, part2, part3};
  const Lanes low = Lanes{} + column.low, high = Lanes{} + column.high;
  for (int64_t k = 0; k < kParts; ++k) {
    const int64_t at = k * kLanes;
    const Lanes scale = lanes(column.scale + at);
    const Lanes zero_point = column.zero_point != nullptr ? lanes(column.zero_point + at) : Lanes{};
    Lanes forgotten{};
    if constexpr (kFirstOrder) {
      const Lanes distance = parts[k] - lanes(column.target + at);
      parts[k] -= column.pulled * distance;
      forgotten = column.forgotten * distance;
    }
    Lanes position = parts[k] / scale + zero_point;
    position = position > low ? position : low;  // NaN becomes a code as well
    position = position > high ? high : position;
    const Lanes code = (position + kRounder) - kRounder, value = (code - zero_point) * scale;
    Lanes error = lanes(column.target + at) - value;
    const Lanes miss = parts[k] - value;
    loss += column.pivot * miss * miss - column.added * error * error;
    if constexpr (kFirstOrder) error -= forgotten;
    lanes(errors + count * kRowsInStrip + at) = error;
    lanes(column.target + at) = error;
    *reinterpret_cast<Bytes*>(column.code + at) =
        __builtin_convertvector(__builtin_convertvector(code, IntLanes), Bytes);
  }
}

struct Strip {
  float* target;
  const float* corrected;
  const float* feedback;
  const float* scale;
  const float* zero_point;
  int8_t* codes;
  const float *pivots, *added;
  const int64_t* groups;
  int64_t width, rows, feedback_stride;
  float low, high, first_order;
};

template <bool kFirstOrder>
[[gnu::always_inline]] inline double round_columns_of(const Strip& strip, float* __restrict errors) {
  Lanes loss{};
  const float kept = 1 - strip.first_order;
  for (int64_t j = 0; j < strip.width; ++j) {
    const int64_t group = strip.groups[j] * strip.rows;
    round_column<kFirstOrder>({.target = strip.target + j * strip.rows,
                               .corrected = strip.corrected + j * strip.rows,
                               .scale = strip.scale + group,
                               .zero_point = strip.zero_point != nullptr ? strip.zero_point + group : nullptr,
                               .code = strip.codes + j * strip.rows,
                               .pivot = strip.pivots[j],
                               .added = strip.added[j],
                               .low = strip.low,
                               .high = strip.high,
                               .pulled = strip.first_order,
                               .forgotten = 1 - kept * kept},
                              strip.feedback + j * strip.feedback_stride, j, errors, loss);
  }
  double sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += loss[lane];
  return sum;
}

/// All columns of one strip of rows; returns their loss.
__attribute__((target_clones("avx512f", "avx2", "default"))) double round_strip(const Strip& strip,
                                                                                float* __restrict errors) {
  return round_columns_of<false>(strip, errors);
}

__attribute__((target_clones("avx512f", "avx2", "default"))) double round_strip_with_first_order(
    const Strip& strip, float* __restrict errors) {
  return round_columns_of<true>(strip, errors);
}

/// By tensor operations on any device: five a column, without reading anything back.
void round_by_operations(const GptqBlock& block, const Tensor& losses) {
  const int64_t width = block.target.size(0);
  const bool shifted = block.qparams.zero_point.defined();
  const Tensor scale = block.qparams.scale.index_select(0, block.groups);
  const Tensor zero_point = shifted ? block.qparams.zero_point.index_select(0, block.groups) : Tensor();
  const Tensor target = block.target.clone(), errors = block.target;
  const Tensor seen = at::empty_like(target), codes = at::empty_like(target);
  for (int64_t j = 0; j < width; ++j) {
    Tensor position = codes[j], corrected = seen[j];
    at::addmv_out(corrected, block.corrected[j], errors.slice(0, 0, j).t(), block.feedback[j].slice(0, 0, j));
    Tensor forgotten;
    if (block.first_order != 0) {
      const float kept = 1 - block.first_order;
      const Tensor distance = corrected - target[j];
      corrected.sub_(distance, block.first_order);
      forgotten = distance * (1 - kept * kept);
    }
    at::div_out(position, corrected, scale[j]);
    if (shifted) position.add_(zero_point[j]);
    position.clamp_(block.low, block.high).round_();
    errors[j].addcmul_(shifted ? position - zero_point[j] : position, scale[j], -1);
    if (forgotten.defined()) errors[j].sub_(forgotten);
  }
  block.codes.copy_(codes);
  const Tensor value = (shifted ? codes - zero_point : codes) * scale;
  const Tensor missed = (seen - value).square_().mul_(block.pivots.unsqueeze(1));
  const Tensor damped = (target - value).square_().mul_(block.added.unsqueeze(1));
  losses[0].add_((missed - damped).sum(at::kDouble));
}

}  // namespace

void round_block(const GptqBlock& block, const Tensor& losses) {
  const int64_t width = block.target.size(0), rows = block.target.size(1);
  TORCH_INTERNAL_ASSERT(rows % kRowsInStrip == 0 && losses.numel() == rows / kRowsInStrip &&
                        block.groups.numel() == width);
  if (!block.target.is_cpu()) return round_by_operations(block, losses);
  const bool shifted = block.qparams.zero_point.defined();
  const Strip all{.target = block.target.mutable_data_ptr<float>(),
                  .corrected = block.corrected.const_data_ptr<float>(),
                  .feedback = block.feedback.const_data_ptr<float>(),
                  .scale = block.qparams.scale.const_data_ptr<float>(),
                  .zero_point = shifted ? block.qparams.zero_point.const_data_ptr<float>() : nullptr,
                  .codes = block.codes.mutable_data_ptr<int8_t>(),
                  .pivots = block.pivots.const_data_ptr<float>(),
                  .added = block.added.const_data_ptr<float>(),
                  .groups = block.groups.const_data_ptr<int64_t>(),
                  .width = width,
                  .rows = rows,
                  .feedback_stride = block.feedback.stride(0),
                  .low = block.low,
                  .high = block.high,
                  .first_order = block.first_order};
  auto* loss = losses.mutable_data_ptr<double>();
  at::parallel_for(0, rows / kRowsInStrip, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> errors(width * kRowsInStrip);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t top = index * kRowsInStrip;
      Strip strip = all;
      strip.target += top;
      strip.corrected += top;
      strip.scale += top;
      if (strip.zero_point != nullptr) strip.zero_point += top;
      strip.codes += top;
      loss[index] += block.first_order == 0 ? round_strip(strip, errors.data())
                                            : round_strip_with_first_order(strip, errors.data());
    }
  });
}

}  // namespace baseq
