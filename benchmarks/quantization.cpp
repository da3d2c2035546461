/// Times of the quantizers beside what bounds them: a copy of the same bytes and a matrix product of the same size.
///
///     quantization [threads] [repeats]

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "baseq/quant/gptq.h"
#include "baseq/quant/quantize.h"

namespace {

using at::Tensor;

/// The fastest of `repeats` runs after one that warms up, in milliseconds.
template <class Fn>
double milliseconds(int repeats, const Fn& f) {
  f();
  double best = 1e300;
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    f();
    best = std::min(best, std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

void report(const char* what, double time, double reference, const char* unit) {
  std::printf("%-58s %10.2f ms %8.2f x %s\n", what, time, time / reference, unit);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) at::set_num_threads(std::atoi(argv[1]));
  const int repeats = argc > 2 ? std::atoi(argv[2]) : 3;
  at::manual_seed(1);
  std::printf("%d threads, the fastest of %d runs\n", at::get_num_threads(), repeats);

  {
    const baseq::QuantSpec spec{
        .num_bits = 4, .symmetric = false, .strategy = baseq::Strategy::kToken, .dynamic = true};
    const Tensor x = at::randn({2048, 4096}), out = at::empty_like(x), grad = at::randn({2048, 4096});
    const Tensor clip = at::full({1, 1}, 0.9), gain = at::ones({4096}), shift = at::randn({4096}) * 0.1;
    const double copy = milliseconds(10 * repeats, [&] { out.copy_(x); });
    report("copy of [2048, 4096] float32", copy, copy, "copy");
    report("fake_quantize_dynamic forward",
           milliseconds(10 * repeats, [&] { baseq::fake_quantize_dynamic(x, spec, clip, {}, {}, true); }), copy,
           "copy");
    report("fake_quantize_dynamic forward with gain and shift",
           milliseconds(10 * repeats, [&] { baseq::fake_quantize_dynamic(x, spec, clip, gain, shift, true); }), copy,
           "copy");
    for (const Tensor& t : {x, clip, gain, shift}) t.requires_grad_();
    report("fake_quantize_dynamic forward and backward",
           milliseconds(10 * repeats,
                        [&] {
                          for (const Tensor& t : {x, clip, gain, shift}) t.mutable_grad() = Tensor();
                          baseq::fake_quantize_dynamic(x, spec, clip, gain, shift, true).backward(grad);
                        }),
           copy, "copy");
    const Tensor heads = at::randn({2048, 4096});
    const baseq::QuantSpec grouped{
        .num_bits = 4, .symmetric = false, .strategy = baseq::Strategy::kGroup, .group_size = 128, .dynamic = true};
    report("fake_quantize_dynamic forward, groups of 128",
           milliseconds(10 * repeats, [&] { baseq::fake_quantize_dynamic(heads, grouped, {}, {}, {}, true); }), copy,
           "copy");
  }

  const Tensor weight = at::randn({4096, 4096}) * 0.02;
  const double product = milliseconds(repeats, [&] { at::mm(weight, weight); });
  report("float32 product of 4096 x 4096 matrices", product, product, "product");
  const baseq::QuantSpec channel{.num_bits = 4};
  report("search_qparams, one scale a row", milliseconds(1, [&] { baseq::search_qparams(weight, channel); }), product,
         "product");
  report("search_qparams, norm 2", milliseconds(1, [&] { baseq::search_qparams(weight, channel, {.norm = 2}); }),
         product, "product");
  const Tensor basis = at::randn({4096, 4096});
  const Tensor hessian = (at::mm(basis.t(), basis) / 4096).to(at::kDouble);
  for (const bool mse_clip : {false, true}) {
    report(mse_clip ? "gptq, with the search of the clip" : "gptq",
           milliseconds(1, [&] { baseq::gptq(weight, hessian, channel, {.mse_clip = mse_clip}); }), product, "product");
  }
  report("gptq, with cross",
         milliseconds(1, [&] { baseq::gptq(weight, hessian, channel, {.mse_clip = false}, hessian * 0.01); }), product,
         "product");
  const Tensor codes = at::randint(-8, 8, {4096, 4096}, at::kChar);
  report("pack_to_int32, 4 bits", milliseconds(repeats, [&] { baseq::pack_to_int32(codes, 4); }), product, "product");
  return 0;
}
