/// Times of QERA-exact and of GPTQ on layers of a 7B model: the corrections of a model should not take much longer than
/// its rounding.
///
///     low_rank [threads] [rank] [dense]
///
/// With "dense" all eigenvectors of the smaller side are computed as well, which is what the Krylov iteration spares.

#include "baseq/quant/low_rank.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string_view>
#include <utility>
#include <vector>

#include "baseq/quant/gptq.h"

namespace {

using at::Tensor;

template <class Fn>
double seconds(const Fn& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Second moments whose eigenvalues fall as 1 / i, of inputs with a few large channels.
Tensor second_moments(int64_t features) {
  const Tensor falling = at::arange(1, features + 1, at::kFloat).rsqrt().unsqueeze(1);
  Tensor x = at::randn({features, features}) * falling;
  x = at::mm(x.t(), at::randn({features, features})).div_(static_cast<double>(features));
  x.slice(1, 0, 8).mul_(20);
  return at::mm(x.t(), x).to(at::kDouble);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) at::set_num_threads(std::atoi(argv[1]));
  const int64_t rank = argc > 2 ? std::atoll(argv[2]) : 16;
  const bool dense = argc > 3 && std::string_view(argv[3]) == "dense";
  at::manual_seed(1);
  std::printf("%d threads, rank %lld\n", at::get_num_threads(), static_cast<long long>(rank));
  const baseq::QuantSpec spec{.num_bits = 3, .strategy = baseq::Strategy::kGroup, .group_size = 64};
  const std::vector<std::pair<int64_t, int64_t>> shapes = {{4096, 4096}, {4096, 11008}, {11008, 4096}};
  for (const auto& [rows, columns] : shapes) {
    const Tensor weight = at::randn({rows, columns}) * 0.02, moments = second_moments(columns);
    baseq::GptqResult rounded;
    const double plain = seconds([&] { baseq::gptq(weight, moments, spec, {.mse_clip = false}); });
    const double gptq = seconds([&] { rounded = baseq::gptq(weight, moments, spec); });
    const Tensor error = weight - rounded.weight.dequantized();
    baseq::LowRankCorrection correction;
    const double qera = seconds([&] { correction = baseq::reconstruct_error(error, moments, rank); });
    const double before = baseq::quadratic_form(error, moments);
    std::printf(
        "%lld x %lld: GPTQ %.2f s, with clip search %.2f s; QERA-exact %.2f s, %.2f x and %.2f x; takes %.1f %% of "
        "the error\n",
        static_cast<long long>(rows), static_cast<long long>(columns), plain, gptq, qera, qera / plain, qera / gptq,
        100 * correction.removed / before);
    std::fflush(stdout);
    if (!dense) continue;
    const Tensor e = error.to(at::kDouble);
    const double all = seconds([&] {
      const Tensor t = rows > columns ? std::get<1>(at::linalg_qr(e)) : e;
      const auto [values, vectors] = at::linalg_eigh(at::mm(at::mm(t, moments), t.t()));
      const int64_t kept = std::min(rank, values.size(0));
      const double most = values.narrow(0, values.size(0) - kept, kept).sum().item<double>();
      std::printf("  all eigenvectors take %.4f %% of the error", 100 * most / before);
    });
    std::printf(", %.2f s, %.2f x GPTQ\n", all, all / plain);
  }
  return 0;
}
