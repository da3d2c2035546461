#pragma once

#include "block.h"

namespace baseq::kernels {

/// A dense factor, see SignFactor.
struct DenseFactor {
  int order = 1;
  const uint8_t* codes = nullptr;  ///< [order, order / 4]
};

/// H_m1 (x) H_m2 (x) H_2^k with its scale; at most two dense factors.
struct HadamardPlan {
  DenseFactor factors[2];
  int num_factors = 0;
  int power_of_two = 1, size = 1;
  float scale = 1;
};

/// +-a +-b +-c +-d, a minus sign where the code has a bit, in the order in which the CPU's table adds them.
BASEQ_KERNEL float signed_sum(float a, float b, float c, float d, int code) {
  const int low = code & 3, high = code >> 2;
  const float ab = (low == 0 || low == 3) ? a + b : b - a, cd = (high == 0 || high == 3) ? c + d : d - c;
  return (high < 2 ? cd : -cd) + (low < 2 ? ab : -ab);
}

/// x = x H * scale for one row.
/// @param x     [size], in shared memory
/// @param other [size], in shared memory
template <class Block>
BASEQ_KERNEL void hadamard_row(const Block& block, const HadamardPlan& plan, float* x, float* other) {
  constexpr int kGroupsPerTable = 8;  // of the CPU's kernel: its sums are added in this order
  for (int stride = 1; stride < plan.power_of_two; stride *= 2) {
    const bool last = stride * 2 == plan.power_of_two && plan.num_factors == 0;
    const float scale = last ? plan.scale : 1.0F;
    block.each([&](int thread) {
      for (int pair = thread; pair < plan.size / 2; pair += Block::kThreads) {
        const int i = pair / stride * 2 * stride + pair % stride;
        const float a = x[i], b = x[i + stride];
        x[i] = (a + b) * scale;
        x[i + stride] = (a - b) * scale;
      }
    });
  }
  int inner = plan.power_of_two;
  for (int f = 1; f >= 0; --f) {
    if (f >= plan.num_factors) continue;
    const DenseFactor factor = f == 0 ? plan.factors[0] : plan.factors[1];
    const int num_groups = factor.order / 4;
    const float scale = f == 0 ? plan.scale : 1.0F;
    block.each([&](int thread) {
      for (int at = thread; at < plan.size; at += Block::kThreads) {
        const int r = at / inner % factor.order, column = at % inner, first = at - r * inner - column;
        const float* in = x + first + column;
        const uint8_t* codes = factor.codes + r * num_groups;
        float total = 0;
        for (int begin = 0; begin < num_groups; begin += kGroupsPerTable) {
          const int end = begin + kGroupsPerTable < num_groups ? begin + kGroupsPerTable : num_groups;
          float sum = 0;
          for (int g = begin; g < end; ++g) {
            const float* four = in + 4 * g * inner;
            const float value = signed_sum(four[0], four[inner], four[2 * inner], four[3 * inner], codes[g]);
            sum = g == begin ? value : sum + value;
          }
          total = begin == 0 ? sum : sum + total;
        }
        other[at] = total * scale;
      }
    });
    block.each([&](int thread) {
      for (int at = thread; at < plan.size; at += Block::kThreads) x[at] = other[at];
    });
    inner *= factor.order;
  }
}

}  // namespace baseq::kernels
