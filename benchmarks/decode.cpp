/// Time of decode_linear for one token, beside what bounds it and what it replaces.
///
///     decode [threads] [rounds] [group size]
///
/// As in a model, no weight is still in a cache when its turn comes: every call takes the next of several copies.

#include "baseq/quant/decode.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "timing.h"

namespace {

using at::Tensor;

constexpr int64_t kBytesOfCopies = int64_t{256} << 20;

volatile uint64_t g_sum;

using baseq::benchmark::microseconds;
using baseq::benchmark::sum_of;
using baseq::benchmark::total;
using baseq::benchmark::Words;

/// Reads every byte of four rows of `row_bytes` side by side, with the next four on their way.
__attribute__((target_clones("avx512f", "avx2", "default"))) uint64_t sum_of_rows(const char* bytes, int64_t n,
                                                                                  int64_t row_bytes) {
  Words sums[4] = {};
  for (; n >= 4 * row_bytes; bytes += 4 * row_bytes, n -= 4 * row_bytes) {
    for (int64_t i = 0; i + 64 <= row_bytes; i += 64) {
#pragma GCC unroll 4
      for (int64_t k = 0; k < 4; ++k) {
        __builtin_prefetch(bytes + (4 + k) * row_bytes + i);
        sums[k] += *reinterpret_cast<const Words*>(bytes + k * row_bytes + i);
      }
    }
  }
  return total(sums);
}

template <class Fn>
void read_rows(const Tensor& t, const Fn& sum) {
  const auto* bytes = static_cast<const char*>(t.const_data_ptr());
  const int64_t row_bytes = t.size(1) * t.element_size();
  at::parallel_for(0, t.size(0), 16, [&](int64_t begin, int64_t end) {
    g_sum = sum(bytes + begin * row_bytes, (end - begin) * row_bytes, row_bytes);
  });
}

template <class Fn>
std::vector<Tensor> repeated(int64_t count, const Fn& make) {
  std::vector<Tensor> tensors;
  for (int64_t i = 0; i < count; ++i) tensors.push_back(make());
  return tensors;
}

void benchmark_full_precision(int64_t out, int64_t in, int rounds) {
  const Tensor x = at::randn({1, in});
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const Tensor token = x.to(dtype);
    const int64_t copies = std::max<int64_t>(2, kBytesOfCopies / (out * in * 2));
    const auto weights = repeated(copies, [&] { return at::ones({out, in}, dtype); });
    const auto best = microseconds(rounds, copies, {[&](int64_t i) { at::linear(token, weights[i]); }});
    std::printf("%6lld x %5lld  LibTorch, %s: %.0f us\n", static_cast<long long>(out), static_cast<long long>(in),
                dtype == at::kFloat ? "float32" : "bfloat16", best[0]);
  }
}

void benchmark_decode(int64_t out, int64_t in, int64_t bits, int64_t group_size, int rounds) {
  const baseq::QuantSpec spec{
      .num_bits = bits, .strategy = baseq::Strategy::kGroup, .group_size = group_size, .scale_dtype = at::kBFloat16};
  const int64_t words = (in * bits + 31) / 32, copies = kBytesOfCopies / (out * words * 4);
  std::vector<baseq::PackedLinear> plain(copies);
  for (baseq::PackedLinear& linear : plain) {
    linear.spec = spec;
    linear.in_features = in;
    linear.weight_packed = at::randint(1 << 30, {out, words}, at::kInt);
    linear.weight_scale = at::full({out, in / group_size}, 0.01, at::kBFloat16);
  }
  const Tensor x = at::randn({1, in}), narrow = x.to(at::kBFloat16);
  for (const int64_t rank : {16, 32, 64, 128}) {
    std::vector<baseq::PackedLinear> branched = plain;
    std::vector<baseq::PackedLinear> narrower = plain;
    for (int64_t i = 0; i < copies; ++i) {
      const Tensor A = at::randn({rank, in}), B = at::randn({out, rank});
      branched[i].lora = baseq::store_factors(A, B, at::kBFloat16);
      narrower[i].lora = baseq::store_factors(A, B, at::kChar);
    }
    const auto best = microseconds(rounds, copies,
                                   {[&](int64_t i) {
                                      read_rows(plain[i].weight_packed,
                                                [](const char* bytes, int64_t n, int64_t) { return sum_of(bytes, n); });
                                    },
                                    [&](int64_t i) { read_rows(plain[i].weight_packed, sum_of_rows); },
                                    [&](int64_t i) { baseq::decode_linear(plain[i], x); },
                                    [&](int64_t i) { baseq::decode_linear(branched[i], x); },
                                    [&](int64_t i) {
                                      Tensor y = baseq::decode_linear(plain[i], x);
                                      y.add_(at::linear(at::linear(narrow, branched[i].lora.A), branched[i].lora.B));
                                    },
                                    [&](int64_t i) { baseq::decode_linear(narrower[i], x); }});
    const double read = std::min(best[0], best[1]), none = best[2], fused = best[3], naive = best[4], int8 = best[5];
    std::printf(
        "%6lld x %5lld  %lld bits  rank %3lld  read %4.0f us  no branch %5.0f (%.2f x read)  fused %5.0f  "
        "naive %5.0f (%.2f x fused)  extra time: naive %4.0f, fused %4.0f, removed %3.0f %%, int8 factors %4.0f\n",
        static_cast<long long>(out), static_cast<long long>(in), static_cast<long long>(bits),
        static_cast<long long>(rank), read, none, none / read, fused, naive, naive / fused, naive - none, fused - none,
        100 * (1 - (fused - none) / (naive - none)), int8 - none);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) at::set_num_threads(std::atoi(argv[1]));
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 10;
  const int64_t group_size = argc > 3 ? std::atoi(argv[3]) : 64;
  at::manual_seed(1);
  std::printf("%d threads, the fastest of %d rounds, groups of %lld, scales and factors in bfloat16\n",
              at::get_num_threads(), rounds, static_cast<long long>(group_size));
  for (const int64_t in : {4096, 11008}) {
    benchmark_full_precision(4096, in, rounds);
    for (const int64_t bits : {4, 3}) benchmark_decode(4096, in, bits, group_size, rounds);
  }
  return 0;
}
