#include "starts.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <utility>

#include "baseq/transform/hadamard.h"
#include "pipeline/statistics.h"
#include "transform/greedy_rotation.h"
#include "transform/random_rotation.h"

namespace baseq {
namespace {

using Start = TransformStep::Start;
using StepKind = TransformStep::Kind;

/// As published.
constexpr int64_t kGreedySteps = 256;
/// Tokens that a greedy rotation looks at, those with the largest values.
constexpr int64_t kLoudTokens = 128;

/// Where matrices of that start begin, float64 [count, size, size], each another one where it is random.
Tensor start_matrices(Start start, int64_t count, int64_t size, uint64_t seed) {
  const Tensor identity = at::eye(size, at::kDouble);
  std::vector<Tensor> matrices;
  for (int64_t i = 0; i < count; ++i) {
    switch (start) {
      case Start::kIdentity:
        matrices.push_back(identity);
        break;
      case Start::kHadamard:
        matrices.push_back(hadamard_transform(identity));
        break;
      case Start::kRandom:
        matrices.push_back(random_rotation(size, derived_seed(seed, static_cast<uint64_t>(i))));
        break;
      case Start::kGreedy:
        TORCH_CHECK(false, "start_matrices: a greedy start needs tokens");
    }
  }
  return at::stack(matrices);
}

Factor start_matrix(const TransformStep& step, Site site, const ModelConfig& config, const at::TensorOptions& compute,
                    const Loudest& seen, uint64_t seed) {
  const SiteShape shape = site_shape(site, config);
  const int64_t size = step.block_size > 0 ? step.block_size : shape.width();
  if (step.start == Start::kGreedy) {
    return rotation_factor(greedy_rotation(seen.tokens, size, kGreedySteps, seed).to(compute));
  }
  // At query_key one matrix serves all heads, for queries of a group share their keys.
  const int64_t count = site == Site::kQueryKey ? 1 : shape.features / size;
  return rotation_factor(start_matrices(step.start, count, size, seed).to(compute));
}

Factor start_kronecker(const TransformStep& step, Site site, const ModelConfig& config,
                       const at::TensorOptions& compute, uint64_t seed) {
  const auto [left_size, right_size] = kronecker_sizes(site, config);
  const auto matrix = [&](int64_t size, uint64_t index) {
    return start_matrices(step.start, 1, size, derived_seed(seed, index))[0].to(compute);
  };
  Factor factor{.kind = Factor::Kind::kKronecker, .left = matrix(left_size, 0), .block = right_size};
  if (!step.left_only) factor.right = matrix(right_size, 1);
  return factor;
}

}  // namespace

std::pair<int64_t, int64_t> kronecker_sizes(Site site, const ModelConfig& config) {
  if (site == Site::kO) return {config.num_attention_heads, config.head_dim};
  const int64_t features = site_shape(site, config).features;
  int64_t left = 1;
  for (int64_t divisor = 1; divisor * divisor <= features; ++divisor) {
    if (features % divisor == 0) left = divisor;
  }
  return {left, features / left};
}

bool needs_tokens(const TransformStep& step) {
  return step.kind == StepKind::kPermutation || (step.kind == StepKind::kMatrix && step.start == Start::kGreedy);
}

Factor start_factor(const TransformStep& step, Site site, const ModelConfig& config, const at::TensorOptions& compute,
                    const Loudest& seen, uint64_t seed) {
  const SiteShape shape = site_shape(site, config);
  switch (step.kind) {
    case StepKind::kHadamard:
      // At value and query_key one per head, which at query_key all heads share.
      return hadamard_factor(shape.width(), site == Site::kQueryKey ? 1 : shape.blocks);
    case StepKind::kScale:
      return scale_factor(at::ones({shape.features}, compute));
    case StepKind::kMatrix:
      return start_matrix(step, site, config, compute, seen, seed);
    case StepKind::kKronecker:
      return start_kronecker(step, site, config, compute, seed);
    case StepKind::kPermutation:
      return permutation_factor(zigzag_permutation(seen.maxima, step.block_size));
    case StepKind::kBalance:
    case StepKind::kSmooth:
    case StepKind::kCoarseToFine:
    case StepKind::kSearch:
      break;
  }
  TORCH_CHECK(false, "start_factor: a step of that kind measures all its sites at once");
}

std::map<Site, Loudest> loudest_tokens(const DecoderLayer& layer, const std::vector<Site>& at, const Tensor& stream,
                                       const BlockInputs& inputs) {
  const c10::NoGradGuard no_grad;
  DecoderLayer probe = without_quant_points(layer);
  std::map<Site, Loudest> seen;
  Site last = Site::kQkv;
  for (const Site site : at) {
    last = std::max(last, site);
    probe.point(site).observer = [&loudest = seen[site]](const Tensor& x) {
      Tensor tokens = x.reshape({-1, x.size(-1)});
      tokens = tokens.index_select(0, tokens.isfinite().all(1).nonzero().flatten());
      if (loudest.tokens.defined()) tokens = at::cat({loudest.tokens, tokens});
      const Tensor maxima = tokens.size(0) > 0 ? tokens.abs().amax(0) : at::zeros({x.size(-1)}, x.options());
      loudest.maxima = loudest.maxima.defined() ? at::maximum(loudest.maxima, maxima) : maxima;
      const int64_t count = std::min(kLoudTokens, tokens.size(0));
      loudest.tokens = tokens.index_select(0, std::get<1>(tokens.abs().amax(1).topk(count)));
    };
  }
  for_each_batch(
      stream, inputs.compute(), [&](int64_t, const Tensor& windows) { probe.input_of(last, windows, inputs.rope); },
      inputs.pass);
  return seen;
}

}  // namespace baseq
