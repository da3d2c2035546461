#pragma once

#include "block.h"

namespace baseq::kernels {

/// See GptqBlock; all pointers are to the first row of the strip of rows that a block of threads takes.
struct GptqColumns {
  float* target;            ///< [width, stride]
  const float* corrected;   ///< [width, stride]
  const float* feedback;    ///< [width, feedback_stride]
  const float* scale;       ///< [groups, stride]
  const float* zero_point;  ///< [groups, stride]; null: none
  int8_t* codes;            ///< [width, stride]
  const float *pivots, *added;
  const int64_t* groups;
  int64_t width, stride, feedback_stride;
  float low, high;
};

/// Rounds the columns of a strip of kThreads rows, a row a thread. losses[thread] takes the sum over the columns of
/// pivot * (corrected - value)^2 - added * (target - value)^2.
/// @param errors [width, kThreads], in shared memory
/// @param shares [width], in shared memory
template <class Block>
BASEQ_KERNEL void round_columns(const Block& block, const GptqColumns& at, float* errors, float* shares,
                                typename Block::template PerThread<float>& losses) {
  block.each([&](int thread) { losses[thread] = 0; });
  for (int64_t j = 0; j < at.width; ++j) {
    block.each([&](int thread) {
      for (int64_t i = thread; i < j; i += Block::kThreads) shares[i] = at.feedback[j * at.feedback_stride + i];
    });
    block.each([&](int thread) {
      const int64_t here = j * at.stride + thread, group = at.groups[j] * at.stride + thread;
      float part = at.corrected[here];
      for (int64_t i = 0; i < j; ++i) part = multiply_add(shares[i], errors[i * Block::kThreads + thread], part);
      const float scale = at.scale[group], zero_point = at.zero_point != nullptr ? at.zero_point[group] : 0.0F;
      float position = part / scale + zero_point;
      position = position > at.low ? position : at.low;  // NaN becomes a code as well
      position = position > at.high ? at.high : position;
      const float code = rounded(position), centred = code - zero_point;
      const float error = multiply_add(-centred, scale, at.target[here]);
      const float miss = multiply_add(-centred, scale, part);
      losses[thread] += at.pivots[j] * miss * miss - at.added[j] * error * error;
      errors[j * Block::kThreads + thread] = error;
      at.target[here] = error;
      at.codes[here] = static_cast<int8_t>(code);
    });
  }
}

}  // namespace baseq::kernels
