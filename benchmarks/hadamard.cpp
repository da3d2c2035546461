// Time of hadamard_transform against a copy of the same bytes, both into memory that is already there (copy_) and into
// new memory (clone; hadamard_transform also returns a new tensor). Best of several runs each.

#include "baseq/transform/hadamard.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <limits>

namespace {

template <class Fn>
double best_milliseconds(Fn&& fn) {
  double best = std::numeric_limits<double>::infinity();
  double total = 0;
  for (int run = 0; run < 5 || (total < 1500 && run < 200); ++run) {
    const auto start = std::chrono::steady_clock::now();
    fn();
    const double elapsed = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    best = std::min(best, elapsed);
    total += elapsed;
  }
  return best;
}

}  // namespace

int main() {
  constexpr int64_t kShapes[][2] = {{2048, 11008}, {2048, 1536},   {2048, 576},     {2048, 4096},  {2048, 14336},
                                    {2048, 18944}, {2048 * 9, 64}, {2048 * 9, 128}, {2048 * 9, 80}};
  std::printf("%16s %8s %10s %10s %10s %12s %12s\n", "shape", "threads", "transform", "copy_", "clone", "over copy_",
              "over clone");
  at::manual_seed(0);
  for (const auto& shape : kShapes) {
    const at::Tensor x = at::randn({shape[0], shape[1]});
    at::Tensor y = at::empty_like(x);
    for (const int threads : {1, 2}) {
      at::set_num_threads(threads);
      const double transform = best_milliseconds([&] { baseq::hadamard_transform(x); });
      const double copy = best_milliseconds([&] { y.copy_(x); });
      const double clone = best_milliseconds([&] { x.clone(); });
      std::printf("%8lld x %5lld %8d %7.2f ms %7.2f ms %7.2f ms %12.2f %12.2f\n", static_cast<long long>(shape[0]),
                  static_cast<long long>(shape[1]), threads, transform, copy, clone, transform / copy,
                  transform / clone);
    }
  }
}
