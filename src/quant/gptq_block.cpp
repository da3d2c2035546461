#include "gptq_block.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "grid.h"

namespace baseq {
namespace {

/// Rows do not depend on one another: this many go side by side, with the columns one after the other.
constexpr int64_t kRows = 32;
/// Adding and taking away 1.5 * 2^23 rounds |x| < 2^22 to the nearest integer, halves to even.
constexpr float kRounder = 12582912.0F;

/// One column of kRows rows: the code and the error that is left. The quotient is the one of quantize().
__attribute__((target_clones("avx512f", "avx2", "default"))) void round_column(const float* corrected,
                                                                               const float* target, const float* scale,
                                                                               const float* zero_point, float low,
                                                                               float high, float* __restrict code,
                                                                               float* __restrict error) {
  for (int64_t lane = 0; lane < kRows; ++lane) {
    float position = corrected[lane] / scale[lane] + zero_point[lane];
    position = position > low ? position : low;  // NaN becomes a code as well
    position = position > high ? high : position;
    code[lane] = (position + kRounder) - kRounder;
    error[lane] = target[lane] - (code[lane] - zero_point[lane]) * scale[lane];
  }
}

/// Every later column of the block makes up for its share of the error.
__attribute__((target_clones("avx512f", "avx2", "default"))) void feed_back(const float* __restrict error,
                                                                            const float* __restrict feedback,
                                                                            int64_t num_columns,
                                                                            float* __restrict corrected) {
  for (int64_t column = 0; column < num_columns; ++column) {
    const float share = feedback[column];
    for (int64_t lane = 0; lane < kRows; ++lane) corrected[column * kRows + lane] += share * error[lane];
  }
}

}  // namespace

void round_block(const GptqBlock& block, const Tensor& codes, const Tensor& errors) {
  const int64_t rows = block.target.size(0), columns = block.target.size(1), width = block.end - block.begin;
  const int64_t groups = block.qparams.scale.size(1);
  const auto low = static_cast<float>(code_min(block.spec)), high = static_cast<float>(code_max(block.spec));
  const float* target = block.target.const_data_ptr<float>();
  const float* corrected = block.corrected.const_data_ptr<float>();
  const float* feedback = block.feedback.const_data_ptr<float>();
  const float* scales = block.qparams.scale.const_data_ptr<float>();
  const float* zero_points =
      block.qparams.zero_point.defined() ? block.qparams.zero_point.const_data_ptr<float>() : nullptr;
  const auto* order = block.column_order.const_data_ptr<int64_t>();
  auto* code_out = codes.mutable_data_ptr<int8_t>();
  float* error_out = errors.mutable_data_ptr<float>();
  const int64_t error_stride = errors.stride(0);

  at::parallel_for(0, (rows + kRows - 1) / kRows, 1, [&](int64_t first, int64_t last) {
    // [column][row of the strip]; rows past the last keep zeros and a scale of one.
    std::vector<float> wanted(width * kRows), current(width * kRows), error(width * kRows), code(width * kRows);
    std::vector<float> scale(kRows, 1.0F), zero_point(kRows, 0.0F);
    for (int64_t strip = first; strip < last; ++strip) {
      const int64_t top = strip * kRows, height = std::min(kRows, rows - top);
      for (int64_t lane = 0; lane < height; ++lane) {
        const int64_t offset = (top + lane) * columns + block.begin;
        for (int64_t k = 0; k < width; ++k) {
          wanted[k * kRows + lane] = target[offset + k];
          current[k * kRows + lane] = corrected[offset + k];
        }
      }
      int64_t loaded_group = -1;
      for (int64_t k = 0; k < width; ++k) {
        const int64_t group = order[block.begin + k] / block.group_size;
        if (group != loaded_group) {
          for (int64_t lane = 0; lane < height; ++lane) {
            scale[lane] = scales[(top + lane) * groups + group];
            if (zero_points != nullptr) zero_point[lane] = zero_points[(top + lane) * groups + group];
          }
          loaded_group = group;
        }
        round_column(&current[k * kRows], &wanted[k * kRows], scale.data(), zero_point.data(), low, high,
                     &code[k * kRows], &error[k * kRows]);
        feed_back(&error[k * kRows], feedback + (block.begin + k) * columns + block.begin + k + 1, width - k - 1,
                  current.data() + (k + 1) * kRows);
      }
      for (int64_t lane = 0; lane < height; ++lane) {
        for (int64_t k = 0; k < width; ++k) {
          code_out[(top + lane) * columns + block.begin + k] = static_cast<int8_t>(code[k * kRows + lane]);
          error_out[(top + lane) * error_stride + k] = error[k * kRows + lane];
        }
      }
    }
  });
}

}  // namespace baseq
