#include "machine_speed.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

namespace baseq::cli {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

/// The best of several runs: what else runs on the machine only makes one slower.
template <class Fn>
double best_seconds(int runs, Fn&& fn) {
  double best = 1e9;
  for (int i = 0; i < runs; ++i) {
    const auto start = Clock::now();
    fn();
    best = std::min(best, seconds_since(start));
  }
  return best;
}

__attribute__((target_clones("avx512f", "avx2", "default"))) uint64_t read_words(const uint64_t* words, int64_t count) {
  constexpr int64_t kWordsAhead = 512, kLine = 64;
  uint64_t sums[16] = {};
  for (int64_t i = 0; i + kLine <= count; i += kLine) {
    for (int64_t line = 0; line < kLine; line += 8) __builtin_prefetch(words + i + line + kWordsAhead);
    for (int64_t j = 0; j < kLine; j += 16) {
      for (int k = 0; k < 16; ++k) sums[k] ^= words[i + j + k];
    }
  }
  uint64_t sum = 0;
  for (const uint64_t s : sums) sum ^= s;
  return sum;
}

#ifdef __x86_64__
constexpr int64_t kRounds = 1 << 21;
constexpr int kAccumulators = 12;

// Twelve independent sums hide the latency of the instruction.
#define BASEQ_TWELVE(instruction, reg)                                                                          \
  instruction " %%" reg "12, %%" reg "13, %%" reg "0\n" instruction " %%" reg "12, %%" reg "13, %%" reg         \
              "1\n" instruction " %%" reg "12, %%" reg "13, %%" reg "2\n" instruction " %%" reg "12, %%" reg    \
              "13, %%" reg "3\n" instruction " %%" reg "12, %%" reg "13, %%" reg "4\n" instruction " %%" reg    \
              "12, %%" reg "13, %%" reg "5\n" instruction " %%" reg "12, %%" reg "13, %%" reg "6\n" instruction \
              " %%" reg "12, %%" reg "13, %%" reg "7\n" instruction " %%" reg "12, %%" reg "13, %%" reg         \
              "8\n" instruction " %%" reg "12, %%" reg "13, %%" reg "9\n" instruction " %%" reg "12, %%" reg    \
              "13, %%" reg "10\n" instruction " %%" reg "12, %%" reg "13, %%" reg "11\n"
#define BASEQ_VECTORS \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13"

__attribute__((target("avx512f"))) void multiply_avx512() {
  for (int64_t i = 0; i < kRounds; ++i) asm volatile(BASEQ_TWELVE("vpdpbusd", "zmm")::: BASEQ_VECTORS);
}
__attribute__((target("avx2"))) void multiply_avxvnni() {
  for (int64_t i = 0; i < kRounds; ++i) asm volatile(BASEQ_TWELVE("%{vex%} vpdpbusd", "ymm")::: BASEQ_VECTORS);
}
// Without VNNI a product is followed by an addition of pairs and one of sums; the product is the scarce one.
__attribute__((target("avx2"))) void multiply_avx2() {
  for (int64_t i = 0; i < kRounds; ++i) asm volatile(BASEQ_TWELVE("vpmaddubsw", "ymm")::: BASEQ_VECTORS);
}
#endif

}  // namespace

double measure_read_bandwidth() {
  constexpr int64_t kWords = int64_t{32} << 20;
  // Each word written, so that every page exists.
  const std::vector<uint64_t> words(static_cast<size_t>(kWords), 1);
  std::atomic<uint64_t> sum{0};
  const double seconds = best_seconds(8, [&] {
    at::parallel_for(0, kWords, kWords / at::get_num_threads(),
                     [&](int64_t begin, int64_t end) { sum ^= read_words(words.data() + begin, end - begin); });
  });
  return static_cast<double>(kWords) * sizeof(uint64_t) / seconds;
}

double measure_multiply_peak() {
#ifdef __x86_64__
  void (*multiply)() = nullptr;
  int64_t bytes = 32;
  if (__builtin_cpu_supports("avx512vnni")) {
    multiply = multiply_avx512;
    bytes = 64;
  } else if (__builtin_cpu_supports("avxvnni")) {
    multiply = multiply_avxvnni;
  } else if (__builtin_cpu_supports("avx2")) {
    multiply = multiply_avx2;
  }
  if (multiply == nullptr) return 0;
  const int64_t threads = at::get_num_threads();
  const double seconds = best_seconds(5, [&] {
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin) multiply();
    });
  });
  return static_cast<double>(2 * bytes * kAccumulators * kRounds * threads) / seconds;
#else
  return 0;
#endif
}

}  // namespace baseq::cli
