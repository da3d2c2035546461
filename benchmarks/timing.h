#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <vector>

namespace baseq::benchmark {

/// Microseconds of each of `work`, called with 0, 1, ... up to `copies`: the fastest mean over all copies. The
/// candidates take turns, so that what else the machine does meets them alike.
inline std::vector<double> microseconds(int rounds, int64_t copies,
                                        const std::vector<std::function<void(int64_t)>>& work) {
  std::vector<double> best(work.size(), 1e300);
  for (int round = 0; round <= rounds; ++round) {
    for (size_t i = 0; i < work.size(); ++i) {
      const auto start = std::chrono::steady_clock::now();
      for (int64_t copy = 0; copy < copies; ++copy) work[i](copy);
      const double time = std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count() /
                          static_cast<double>(copies);
      if (round > 0) best[i] = std::min(best[i], time);
    }
  }
  return best;
}

using Words = uint64_t __attribute__((vector_size(64), aligned(4), may_alias));

inline uint64_t total(const Words (&sums)[4]) {
  const Words all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return all[0] + all[1] + all[2] + all[3] + all[4] + all[5] + all[6] + all[7];
}

/// Reads every byte, one after the other.
__attribute__((target_clones("avx512f", "avx2", "default"))) static uint64_t sum_of(const char* bytes, int64_t n) {
  Words sums[4] = {};
  for (int64_t i = 0; i + 256 <= n; i += 256) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < 4; ++k) {
      __builtin_prefetch(bytes + i + 64 * k + 2048);
      sums[k] += *reinterpret_cast<const Words*>(bytes + i + 64 * k);
    }
  }
  return total(sums);
}

}  // namespace baseq::benchmark
