#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/grad_mode.h>
#include <torch/optim/adam.h>

#include <cmath>
#include <limits>
#include <numbers>
#include <vector>

#include "baseq/quant/low_rank.h"
#include "finite.h"
#include "grid.h"
#include "product.h"

namespace baseq {
namespace {

struct Factors {
  Tensor A, B;  ///< float32
};

double root_mean_square(const Tensor& x) { return std::sqrt(x.square().mean().item<double>()); }

Factors start_factors(const Tensor& weight, const Tensor& moments, const QuantSpec& spec,
                      const FbquantOptions& options) {
  const int64_t rows = weight.size(0), columns = weight.size(1);
  if (options.start == FbquantOptions::Start::kZero) {
    const int64_t rank = std::min({options.rank, rows, columns});
    const auto generator = at::make_generator<at::CPUGeneratorImpl>(options.seed);
    const Tensor random = at::randn({rank, columns}, generator, at::kFloat).to(weight.options());
    return {random / std::sqrt(static_cast<double>(columns)), at::zeros({rows, rank}, weight.options())};
  }
  const Tensor error = weight - round_to_nearest(weight, spec, options.mse_clip, options.search).dequantized();
  const bool plain = options.start == FbquantOptions::Start::kSvd;
  const LowRankCorrection correction = reconstruct_error(error, plain ? Tensor() : moments, options.rank);
  // One rate serves both factors when their rows and columns are equally long in pairs.
  const Tensor length = correction.A.square().sum(1).pow(0.25).clamp_min(std::numeric_limits<float>::min());
  return {(correction.A / length.unsqueeze(1)).to(at::kFloat), (correction.B * length).to(at::kFloat)};
}

/// The state with the least loss. It is chosen on the device of the weight, without reading a loss.
class Best {
 public:
  /// Copies, for the optimizer goes on to change what it is given.
  void offer(const Tensor& loss, const LowRankFactors& lora, const Tensor& clip) {
    const bool first = !loss_.defined();
    const Tensor better = first ? Tensor() : loss < loss_;
    const auto take = [&](Tensor& kept, const Tensor& other) {
      if (other.defined()) kept = first ? other.clone() : at::where(better, other, kept);
    };
    take(loss_, loss);
    take(lora_.A, lora.A);
    take(lora_.B, lora.B);
    take(lora_.A_scale, lora.A_scale);
    take(lora_.B_scale, lora.B_scale);
    take(clip_, clip);
  }
  double loss() const { return loss_.item<double>(); }
  const LowRankFactors& lora() const { return lora_; }
  const Tensor& clip() const { return clip_; }

 private:
  Tensor loss_, clip_;
  LowRankFactors lora_;
};

void check_losses(const std::vector<Tensor>& losses) {
  const Tensor bad = at::stack(losses).isfinite().logical_not().nonzero().cpu();
  TORCH_CHECK(bad.numel() == 0, "fbquant: the loss of step ", bad.numel() == 0 ? 0 : bad[0][0].item<int64_t>(),
              " is not finite; lower the learning rate");
}

/// Steps of learning between two searches of the clip ratios, and ratios that one tries.
constexpr int64_t kStepsPerSearch = 10, kRatiosPerSearch = 20;

void check_factors(const char* who, const Tensor& weight, const Tensor& A, const Tensor& B) {
  const bool fits = weight.dim() == 2 && A.dim() == 2 && B.dim() == 2 && A.size(1) == weight.size(1) &&
                    B.size(0) == weight.size(0) && A.size(0) == B.size(1);
  TORCH_CHECK(fits, who, ": A is ", A.sizes(), " and B ", B.sizes(), " but weight is ", weight.sizes(),
              ", expected [r, in_features], [out_features, r] and [out_features, in_features]");
}

}  // namespace

Tensor clip_of(const Tensor& x, const QuantSpec& spec, const Tensor& scale) {
  return (scale / compute_qparams(x, spec).scale).clamp_max(1).unsqueeze(-1);
}

QuantizedWeight round_beside(const Tensor& weight, const LowRankFactors& lora, const QuantSpec& spec,
                             const Tensor& clip) {
  check_factors("round_beside", weight, lora.A, lora.B);
  const at::NoGradGuard no_grad;
  const Tensor rest = weight - lora.product();
  const QParams qparams = compute_qparams(rest, spec, clip);
  return {spec, quantize(rest, qparams, spec), qparams};
}

Tensor feedback_weight(const Tensor& weight, const Tensor& A, const Tensor& B, const QuantSpec& spec,
                       at::ScalarType dtype, const Tensor& clip) {
  check_factors("feedback_weight", weight, A, B);
  const auto [stored, rounded] = [&] {
    const at::NoGradGuard no_grad;
    const LowRankFactors factors = store_factors(A, B, dtype);
    const Tensor rest = weight - factors.product();
    return std::pair(factors, fake_quantize(rest, compute_qparams(rest, spec, clip), spec));
  }();
  const auto rounded_to = [](const Tensor& learned, const Tensor& kept) { return learned + (kept - learned).detach(); };
  return at::addmm(rounded, rounded_to(B, stored.dequantized_B()), rounded_to(A, stored.dequantized_A()));
}

FbquantResult fbquant(const Tensor& weight, const Tensor& moments, const QuantSpec& spec,
                      const FbquantOptions& options) {
  check_weight_spec("fbquant", spec);
  TORCH_CHECK(weight.dim() == 2 && weight.is_floating_point(), "fbquant: weight is ", weight.scalar_type(), " of size ",
              weight.sizes(), ", expected a floating type and [out_features, in_features]");
  const int64_t columns = weight.size(1);
  TORCH_CHECK(moments.sizes() == at::IntArrayRef({columns, columns}), "fbquant: moments are ", moments.sizes(),
              " but weight is ", weight.sizes());
  TORCH_CHECK(options.rank > 0 && options.steps >= 0 && options.learning_rate >= 0, "fbquant: rank is ", options.rank,
              ", steps ", options.steps, " and learning_rate ", options.learning_rate,
              ", expected a positive number and two that are not negative");
  const at::NoGradGuard no_grad;
  const Tensor source = weight.to(at::kFloat).contiguous();
  const Tensor h = moments.to(source.options());
  TORCH_CHECK(all_finite(source) && all_finite(h), "fbquant: weight or moments have a value that is not finite");
  const double energy = quadratic_form(source, h), unit = energy > 0 ? energy : 1;

  Factors learned = start_factors(source, moments, spec, options);
  const double rate = options.learning_rate * root_mean_square(learned.A);
  torch::optim::Adam optimizer(std::vector<Tensor>{learned.A, learned.B}, torch::optim::AdamOptions(rate).eps(1e-15));
  MseSearch search = options.search;
  search.num_steps = std::min(search.num_steps, kRatiosPerSearch);
  Tensor clip;
  Best best;
  std::vector<Tensor> losses;
  for (int64_t step = 0; step <= options.steps; ++step) {
    const LowRankFactors lora = store_factors(learned.A, learned.B, options.dtype);
    const Factors stored{lora.dequantized_A(), lora.dequantized_B()};
    const Tensor rest = at::addmm(source, stored.B, stored.A, /*beta=*/1, /*alpha=*/-1);
    if (options.mse_clip && step % kStepsPerSearch == 0)
      clip = clip_of(rest, spec, search_qparams(rest, spec, search).scale);
    const QParams qparams = compute_qparams(rest, spec, clip);
    const Tensor error = rest - fake_quantize(rest, qparams, spec);
    const Tensor gradient = matrix_product(error, h);  // of + B A, up to -2
    losses.push_back((gradient * error).sum(at::kDouble) / unit);
    best.offer(losses.back(), lora, clip);
    if (step == options.steps) break;
    learned.A.mutable_grad() = matrix_product(stored.B.t(), gradient).mul_(-2 / unit);
    learned.B.mutable_grad() = matrix_product(gradient, stored.A.t()).mul_(-2 / unit);
    const double cosine = 0.5 * (1 + std::cos(std::numbers::pi * static_cast<double>(step) / options.steps));
    optimizer.param_groups()[0].options().set_lr(rate * cosine);
    optimizer.step();
  }

  check_losses(losses);
  FbquantResult result{.lora = best.lora(), .clip = best.clip()};
  result.loss_before = losses.front().item<double>();
  result.relative_error = best.loss();
  result.weight = round_beside(source, result.lora, spec, result.clip);
  return result;
}

}  // namespace baseq
