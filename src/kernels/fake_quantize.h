#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "block.h"

/// Fake quantization over the range of each group of a row, forward and backward, in the order of the CPU's fused
/// kernels (quant/fused.cpp, quant/grid_kernels.cpp).
namespace baseq::kernels {

constexpr float kInfinity = __builtin_inff();

enum class ScaleType { kFloat, kHalf, kBFloat16 };

/// What a dynamic QuantSpec says.
struct RangeRule {
  float num_steps = 15, low_code = -8, high_code = 7;
  float smallest_scale = 0;
  bool symmetric = false;
  ScaleType scale_type = ScaleType::kFloat;
};

struct RowGrid {
  float scale = 1, base = 0, low = 0, high = 0;
  bool clamped = false;
};

BASEQ_KERNEL float as_stored(float scale, ScaleType type) {
  if (type == ScaleType::kHalf) return static_cast<float>(c10::Half(scale));
  if (type == ScaleType::kBFloat16) return static_cast<float>(c10::BFloat16(scale));
  return scale;
}

/// See grid_over.
BASEQ_KERNEL RowGrid grid_over_range(float low, float high, float clip, const RangeRule& rule) {
  RowGrid grid;
  float scale = 0;
  if (rule.symmetric) {
    const float up = clip * high, down = -(clip * low);
    scale = (up < down ? down : up) / (rule.num_steps / 2);
    grid.low = rule.low_code;
    grid.high = rule.high_code;
  } else {
    const float middle = (high + low) / 2, half = (high - low) / 2, reach = clip * half;
    grid.base = middle - reach;
    scale = (middle + reach - grid.base) / rule.num_steps;
    grid.high = rule.num_steps;
  }
  grid.clamped = scale < rule.smallest_scale;
  grid.scale = as_stored(grid.clamped ? rule.smallest_scale : scale, rule.scale_type);
  return grid;
}

/// One group of a row. Null: no clip, gain or shift.
struct Group {
  const float* x;
  const float *gain, *shift;
  float clip = 1;
  int64_t size = 0;

  BASEQ_KERNEL float u(int64_t i) const {
    if (gain != nullptr && shift != nullptr) return multiply_add(gain[i], x[i], -shift[i]);
    if (gain != nullptr) return gain[i] * x[i];
    return shift != nullptr ? x[i] - shift[i] : x[i];
  }
};

struct Extreme {
  float low = kInfinity, high = -kInfinity;
  int64_t low_at = 0, high_at = 0;

  /// Takes in what another thread found; of equal values the first one counts.
  BASEQ_KERNEL void add(float other_low, int64_t other_low_at, float other_high, int64_t other_high_at) {
    if (other_low < low || (other_low == low && other_low_at < low_at)) low = other_low, low_at = other_low_at;
    if (other_high > high || (other_high == high && other_high_at < high_at))
      high = other_high, high_at = other_high_at;
  }
};

/// The extremes of a group; NaN is skipped.
/// @param shared [kThreads]; the first holds the result until the next call
template <class Block>
BASEQ_KERNEL void find_group_extremes(const Block& block, const Group& group, Extreme* shared) {
  block.each([&](int thread) {
    Extreme found;
    for (int64_t i = thread; i < group.size; i += Block::kThreads) {
      const float u = group.u(i);
      if (u < found.low) found.low = u, found.low_at = i;
      if (u > found.high) found.high = u, found.high_at = i;
    }
    shared[thread] = found;
  });
  for (int width = Block::kThreads / 2; width > 0; width /= 2) {
    block.each([&](int thread) {
      if (thread >= width) return;
      const Extreme& other = shared[thread + width];
      shared[thread].add(other.low, other.low_at, other.high, other.high_at);
    });
  }
}

/// @param add_shift_back the shift is added to the result
template <class Block>
BASEQ_KERNEL void fake_quantize_group(const Block& block, const Group& group, const RangeRule& rule,
                                      bool add_shift_back, float* out, Extreme* shared) {
  find_group_extremes(block, group, shared);
  const RowGrid grid = grid_over_range(shared[0].low, shared[0].high, group.clip, rule);
  block.each([&](int thread) {
    for (int64_t i = thread; i < group.size; i += Block::kThreads) {
      float position = (group.u(i) - grid.base) / grid.scale;
      position = position < grid.low ? grid.low : position;
      position = position > grid.high ? grid.high : position;
      const float value = multiply_add(rounded(position), grid.scale, grid.base);
      out[i] = add_shift_back && group.shift != nullptr ? value + group.shift[i] : value;
    }
  });
}

/// Sums of float terms as the CPU adds them: sixteen lanes in float32 over kSegment terms, then all in float64.
constexpr int64_t kLanes = 16, kSegment = 1024;
BASEQ_KERNEL int64_t num_chains(int64_t size) { return (size + kSegment - 1) / kSegment * kLanes; }

/// Where the sums of one group are while it is worked on, in shared memory.
struct ChainSums {
  float *scale, *outside;            ///< [num_chains]
  float *scale_tail, *outside_tail;  ///< [kLanes], of the last terms that fill no run of lanes
};

struct GroupGradient {
  double low = 0, high = 0, clip = 0;
};

/// The way back from the sums to the ends of the range and the clip.
BASEQ_KERNEL GroupGradient range_gradient(double scale_sum, double outside, const Extreme& range, float ratio,
                                          bool clamped, const RangeRule& rule) {
  const double steps = rule.symmetric ? static_cast<double>(rule.num_steps) / 2 : static_cast<double>(rule.num_steps);
  const double scale = clamped ? 0 : scale_sum / steps;
  const double clip = ratio;
  GroupGradient gradient;
  if (rule.symmetric) {
    if (range.high >= -range.low) {
      gradient.high = scale * clip;
      gradient.clip = scale * range.high;
    } else {
      gradient.low = -scale * clip;
      gradient.clip = -scale * range.low;
    }
    return gradient;
  }
  const double top = scale, bottom = outside - scale;
  gradient.low = 0.5 * (top * (1 - clip) + bottom * (1 + clip));
  gradient.high = 0.5 * (top * (1 + clip) + bottom * (1 - clip));
  gradient.clip = (top - bottom) * ((static_cast<double>(range.high) - range.low) / 2);
  return gradient;
}

/// What the backward pass of a group adds to; null: not asked for.
struct GroupGradients {
  float* x;             ///< [size], written
  float *gain, *shift;  ///< [size], added to
  double* clip;         ///< added to
};

template <class Block>
BASEQ_KERNEL void fake_quantize_group_backward(const Block& block, const Group& group, const float* grad,
                                               const RangeRule& rule, bool add_shift_back,
                                               const GroupGradients& gradients, Extreme* shared,
                                               const ChainSums& sums) {
  find_group_extremes(block, group, shared);
  const Extreme range = shared[0];
  const RowGrid grid = grid_over_range(range.low, range.high, group.clip, rule);
  const int64_t chains = num_chains(group.size), tail = group.size / kLanes * kLanes;
  // Of one element; returns its terms of the sums.
  const auto element = [&](int64_t i, float& scale_term, float& outside_term) {
    const float g = grad[i], position = (group.u(i) - grid.base) / grid.scale;
    // One code beyond each end is enough to tell the clipped elements.
    float bounded = position < grid.low - 1 ? grid.low - 1 : position;
    bounded = bounded > grid.high + 1 ? grid.high + 1 : bounded;
    const float near = rounded(bounded);
    float code = near < grid.low ? grid.low : near;
    code = code > grid.high ? grid.high : code;
    const bool inside = code == near;
    gradients.x[i] = inside ? g : 0.0F;
    scale_term = g * (inside ? code - position : code);
    outside_term = inside ? 0.0F : g;
  };
  block.each([&](int thread) {
    for (int64_t chain = thread; chain < chains; chain += Block::kThreads) {
      const int64_t begin = chain / kLanes * kSegment, end = begin + kSegment < tail ? begin + kSegment : tail;
      float scale = 0, outside = 0, scale_term = 0, outside_term = 0;
      for (int64_t i = begin + chain % kLanes; i < end; i += kLanes) {
        element(i, scale_term, outside_term);
        scale += scale_term;
        outside += outside_term;
      }
      sums.scale[chain] = scale;
      sums.outside[chain] = outside;
    }
    for (int64_t i = tail + thread; i < group.size; i += Block::kThreads) {
      element(i, sums.scale_tail[i - tail], sums.outside_tail[i - tail]);
    }
  });
  block.each([&](int thread) {
    if (thread != 0) return;
    double scale = 0, outside = 0;
    for (int64_t segment = 0; segment < chains; segment += kLanes) {
      double scale_part = 0, outside_part = 0;
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        scale_part += sums.scale[segment + lane];
        outside_part += sums.outside[segment + lane];
      }
      if (segment + kLanes == chains) {
        for (int64_t i = tail; i < group.size; ++i) {
          scale_part += sums.scale_tail[i - tail];
          outside_part += sums.outside_tail[i - tail];
        }
      }
      scale += scale_part;
      outside += outside_part;
    }
    const GroupGradient gradient = range_gradient(scale, outside, range, group.clip, grid.clamped, rule);
    gradients.x[range.low_at] += static_cast<float>(gradient.low);
    gradients.x[range.high_at] += static_cast<float>(gradient.high);
    if (gradients.clip != nullptr) *gradients.clip += gradient.clip;
  });
  block.each([&](int thread) {
    for (int64_t i = thread; i < group.size; i += Block::kThreads) {
      const float du = gradients.x[i];
      if (gradients.gain != nullptr) gradients.gain[i] = multiply_add(du, group.x[i], gradients.gain[i]);
      if (gradients.shift != nullptr && add_shift_back) {
        gradients.shift[i] += grad[i] - du;
      } else if (gradients.shift != nullptr) {
        gradients.shift[i] -= du;
      }
      if (group.gain != nullptr) gradients.x[i] = du * group.gain[i];
    }
  });
}

}  // namespace baseq::kernels
