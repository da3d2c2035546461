/// Products of PreparedLinear: GOP/s for many tokens next to LibTorch's best float32 product, GB/s for one token next
/// to reading memory, and what a low-rank correction adds next to two products of LibTorch.
///
///     integer_gemm [threads] [rounds] [tokens]
///
/// All are ratios within one process. One-token products take the next of several copies, so that no weight is still
/// in a cache when its turn comes.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "integer/prepared_linear.h"
#include "integer/weight_memory.h"
#include "quant/product.h"
#include "timing.h"

namespace {

using at::Tensor;
using baseq::benchmark::microseconds;

constexpr int64_t kBytesOfCopies = int64_t{96} << 20;

volatile uint64_t g_sum;

struct Variant {
  const char* name;
  int64_t weight_bits, group_size, activation_bits;  ///< group_size 0: per channel
  bool fixed_point;
  int64_t rank = 0;
};
constexpr Variant kVariants[] = {
    {"W4A4 per channel", 4, 0, 4, false},       {"W4A8 per channel", 4, 0, 8, false},
    {"W8A8 per channel", 8, 0, 8, false},       {"W4 groups of 64, A8", 4, 64, 8, true},
    {"W4 groups of 64, A15", 4, 64, 15, true},  {"W3 groups of 64, A15", 3, 64, 15, true},
    {"the same, rank 16", 3, 64, 15, true, 16}, {"the same, rank 128", 3, 64, 15, true, 128},
};

baseq::QuantizedWeight random_weight(int64_t out, int64_t in, const Variant& v) {
  const int64_t low = -(1 << (v.weight_bits - 1)), high = 1 << (v.weight_bits - 1);
  const auto strategy = v.group_size > 0 ? baseq::Strategy::kGroup : baseq::Strategy::kChannel;
  return {.spec = {.num_bits = v.weight_bits,
                   .strategy = strategy,
                   .group_size = v.group_size,
                   .scale_dtype = at::kBFloat16},
          .codes = at::randint(low, high, {out, in}, at::kChar),
          .qparams = {at::full({out, v.group_size > 0 ? in / v.group_size : 1}, 0.015625), {}}};
}

baseq::LowRankFactors random_factors(int64_t out, int64_t in, const Variant& v) {
  if (v.rank == 0) return {};
  return baseq::store_factors(at::randn({v.rank, in}), at::randn({out, v.rank}), at::kBFloat16);
}

baseq::Activations activations(const Tensor& x, const baseq::ColumnGroups& columns, const Variant& v) {
  if (v.fixed_point) return baseq::fixed_point_rows(x, columns, v.activation_bits);
  const baseq::QuantSpec spec{
      .num_bits = v.activation_bits, .symmetric = false, .strategy = baseq::Strategy::kToken, .dynamic = true};
  return baseq::quantize_rows(x, columns, spec);
}

void benchmark_many_tokens(int64_t tokens, int64_t out, int64_t in, int rounds) {
  const Tensor x = at::randn({tokens, in}), weight = at::randn({out, in});
  const double operations = 2.0 * static_cast<double>(tokens * out * in);
  for (const Variant& v : kVariants) {
    const baseq::PreparedLinear linear(random_weight(out, in, v), random_factors(out, in, v));
    const baseq::Activations codes = activations(x, linear.columns(), v);
    const auto best =
        microseconds(rounds, 1,
                     {[&](int64_t) { at::linear(x, weight); }, [&](int64_t) { baseq::linear_product(x, weight); },
                      [&](int64_t) { linear.forward(codes); }});
    const double float32 = std::min(best[0], best[1]);
    std::printf("%5lld tokens %5lld x %5lld  %-22s %6.1f GOP/s, float32 %6.1f: %.2f x\n",
                static_cast<long long>(tokens), static_cast<long long>(out), static_cast<long long>(in), v.name,
                operations / best[2] / 1e3, operations / float32 / 1e3, float32 / best[2]);
  }
}

/// Copies of a linear, more than caches hold.
std::vector<baseq::PreparedLinear> copies_of(const baseq::QuantizedWeight& weight,
                                             const baseq::LowRankFactors& factors) {
  std::vector<baseq::PreparedLinear> copies;
  do {
    copies.emplace_back(weight, factors);
  } while (static_cast<int64_t>(copies.size()) <= kBytesOfCopies / copies[0].bytes());
  return copies;
}

void benchmark_one_token(int64_t out, int64_t in, int rounds) {
  const Tensor x = at::randn({1, in});
  for (const Variant& v : kVariants) {
    const auto copies = copies_of(random_weight(out, in, v), random_factors(out, in, v));
    const auto count = static_cast<int64_t>(copies.size());
    const int64_t bytes = copies[0].bytes();
    const baseq::Activations codes = activations(x, copies[0].columns(), v);
    const Tensor memory = baseq::weight_memory(count * bytes).view({count, bytes}).fill_(1);
    const auto read = [&](int64_t i) {
      at::parallel_for(0, bytes, bytes / 16, [&](int64_t begin, int64_t end) {
        const char* first = static_cast<const char*>(memory.const_data_ptr()) + i * bytes;
        g_sum = baseq::benchmark::sum_of(first + begin, end - begin);
      });
    };
    const auto best = microseconds(rounds, count, {read, [&](int64_t i) { copies[i].forward(codes); }});
    std::printf("  one token  %5lld x %5lld  %-22s %6.2f GB/s, reading %6.2f: %3.0f %%\n", static_cast<long long>(out),
                static_cast<long long>(in), v.name, static_cast<double>(bytes) / best[1] / 1e3,
                static_cast<double>(bytes) / best[0] / 1e3, 100 * best[0] / best[1]);
  }
}

/// What a correction adds to a one-token product, compared with two products in bfloat16 and an addition.
void benchmark_corrections(int64_t out, int64_t in, int rounds) {
  const Tensor x = at::randn({1, in});
  for (const int64_t bits : {4, 3}) {
    const Variant plain{"", bits, 64, 15, true};
    const baseq::QuantizedWeight weight = random_weight(out, in, plain);
    const auto without = copies_of(weight, {});
    const baseq::Activations codes = activations(x, without[0].columns(), plain);
    for (const int64_t rank : {16, 32, 64, 128}) {
      Variant corrected = plain;
      corrected.rank = rank;
      const baseq::LowRankFactors factors = random_factors(out, in, corrected);
      const auto with = copies_of(weight, factors);
      const auto count = static_cast<int64_t>(std::min(with.size(), without.size()));
      std::vector<Tensor> down, up;
      for (int64_t i = 0; i < count; ++i) {
        down.push_back(factors.A.clone());
        up.push_back(factors.B.clone());
      }
      const auto separate = [&](int64_t i) {
        const Tensor t = at::linear(x.to(at::kBFloat16), down[i]);
        without[i].forward(codes).add_(at::linear(t, up[i]));
      };
      const auto best = microseconds(
          rounds, count,
          {[&](int64_t i) { without[i].forward(codes); }, [&](int64_t i) { with[i].forward(codes); }, separate});
      std::printf(
          "  one token  %5lld x %5lld  W%lld groups of 64, A15, rank %3lld: %6.1f us more than %6.1f us, separate "
          "products %6.1f us more: %3.0f %%\n",
          static_cast<long long>(out), static_cast<long long>(in), static_cast<long long>(bits),
          static_cast<long long>(rank), best[1] - best[0], best[0], best[2] - best[0],
          100 * (best[1] - best[0]) / (best[2] - best[0]));
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  at::set_num_threads(argc > 1 ? std::atoi(argv[1]) : 1);
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 5;
  const int64_t tokens = argc > 3 ? std::atoi(argv[3]) : 120;
  at::manual_seed(1);
  std::printf("%s kernels, %d threads, the fastest of %d rounds\n", baseq::integer_kernels().name,
              at::get_num_threads(), rounds);
  benchmark_many_tokens(tokens, 1536, 576, 4 * rounds);
  benchmark_many_tokens(tokens, 4096, 4096, rounds);
  benchmark_one_token(4096, 4096, rounds);
  benchmark_corrections(4096, 4096, rounds);
  return 0;
}
