#include <ATen/ATen.h>
#include <ATen/core/PhiloxRNGEngine.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <unordered_set>

#include "baseq/runtime/generate.h"

namespace baseq {
namespace {

struct Candidate {
  int32_t id = 0;
  double logit = 0;
  double weight = 0;  // in proportion to the probability; that of the largest logit is 1
};
using Candidates = std::vector<Candidate>;

bool more_probable(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

void sort_by_id(Candidates& candidates) { std::ranges::sort(candidates, {}, &Candidate::id); }

std::span<const float> values_of(const Tensor& logits) {
  TORCH_CHECK(logits.dim() == 1 && logits.numel() > 0 && logits.scalar_type() == at::kFloat && logits.is_cpu() &&
                  logits.is_contiguous(),
              "sampler: expected float32 logits [vocab_size] on the CPU, got ", logits.sizes());
  return {logits.const_data_ptr<float>(), static_cast<size_t>(logits.numel())};
}

std::vector<double> penalized(std::span<const float> logits, std::span<const int32_t> sequence, double penalty) {
  std::vector<double> result(logits.begin(), logits.end());
  for (const float& logit : logits) {
    TORCH_CHECK(logit < std::numeric_limits<float>::infinity(), "the logits are not finite at position ",
                sequence.size(), ": that of token ", &logit - logits.data(), " is ", logit);
  }
  if (penalty == 1.0) return result;
  for (const int32_t id : std::unordered_set<int32_t>(sequence.begin(), sequence.end())) {
    if (id < 0 || static_cast<size_t>(id) >= result.size()) continue;
    double& logit = result[static_cast<size_t>(id)];
    logit = logit > 0 ? logit / penalty : logit * penalty;
  }
  return result;
}

double total_weight(const Candidates& candidates) {
  double total = 0;
  for (const Candidate& candidate : candidates) total += candidate.weight;
  return total;
}

void keep_top_k(Candidates& candidates, int64_t top_k) {
  const auto count = static_cast<size_t>(top_k);
  if (top_k == 0 || count >= candidates.size()) return;
  std::nth_element(candidates.begin(), candidates.begin() + static_cast<std::ptrdiff_t>(count), candidates.end(),
                   more_probable);
  candidates.resize(count);
  sort_by_id(candidates);
}

void keep_top_p(Candidates& candidates, double top_p) {
  if (top_p >= 1.0) return;
  const double total = total_weight(candidates);
  // All tokens below this together have less than 1 - top_p: none of them is wanted, and few are left to sort.
  const double negligible = (1.0 - top_p) * total / static_cast<double>(candidates.size());
  std::erase_if(candidates, [&](const Candidate& candidate) { return candidate.weight < negligible; });
  std::ranges::sort(candidates, more_probable);
  double sum = 0;
  size_t count = 0;
  while (count < candidates.size() && (count == 0 || sum < top_p * total)) sum += candidates[count++].weight;
  candidates.resize(count);
  sort_by_id(candidates);
}

}  // namespace

void SamplingOptions::check() const {
  const auto in_range = [](const char* name, double value, double min, double max) {
    TORCH_CHECK(value >= min && value <= max, "`", name, "` is ", value, "; expected a number from ", min, " to ", max);
  };
  in_range("temperature", temperature, 0, 1e6);
  in_range("top_k", static_cast<double>(top_k), 0, 1e9);
  in_range("top_p", top_p, 0, 1);
  in_range("min_p", min_p, 0, 1);
  in_range("repetition_penalty", repetition_penalty, 1e-3, 1e3);
}

double random_unit(uint64_t seed, uint64_t position) {
  at::philox_engine engine(seed, position);
  const uint64_t high = engine(), low = engine();
  return std::ldexp(static_cast<double>((high << 32 | low) >> 11), -53);
}

int32_t sample(const Tensor& logits, std::span<const int32_t> sequence, const SamplingOptions& options) {
  const std::vector<double> values = penalized(values_of(logits), sequence, options.repetition_penalty);
  const auto max = std::ranges::max_element(values);  // the first of equal ones
  const auto best = static_cast<int32_t>(max - values.begin());
  if (options.temperature == 0) return best;
  Candidates candidates(values.size());
  for (size_t i = 0; i < values.size(); ++i) candidates[i] = {static_cast<int32_t>(i), values[i]};
  keep_top_k(candidates, options.top_k);
  for (Candidate& candidate : candidates) {
    // All logits may be -inf; the difference would be NaN.
    const double below = candidate.logit == *max ? 0 : candidate.logit - *max;
    candidate.weight = std::exp(below / options.temperature);
  }
  keep_top_p(candidates, options.top_p);
  std::erase_if(candidates, [&](const Candidate& candidate) { return candidate.weight < options.min_p; });
  double left = random_unit(options.seed, sequence.size()) * total_weight(candidates);
  int32_t drawn = best;
  for (const Candidate& candidate : candidates) {
    if (candidate.weight == 0) continue;
    drawn = candidate.id;
    if ((left -= candidate.weight) < 0) break;
  }
  return drawn;
}

TokenLogprobs token_logprobs(const Tensor& logits, int32_t id, int64_t top) {
  const std::span<const float> values = values_of(logits);
  TORCH_CHECK(id >= 0 && static_cast<size_t>(id) < values.size(), "sampler: token ", id, " but there are ",
              values.size(), " logits");
  const double max = *std::ranges::max_element(values);
  double sum = 0;
  for (const float value : values) sum += std::exp(value - max);
  const double log_sum = max + std::log(sum);
  TokenLogprobs result{.id = id, .logprob = values[static_cast<size_t>(id)] - log_sum};
  std::vector<int32_t> ids(values.size());
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i);
  const auto count = std::min<size_t>(static_cast<size_t>(top), ids.size());
  std::partial_sort(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(count), ids.end(),
                    [&](int32_t a, int32_t b) {
                      const float x = values[static_cast<size_t>(a)], y = values[static_cast<size_t>(b)];
                      return x != y ? x > y : a < b;
                    });
  for (size_t i = 0; i < count; ++i) result.top.emplace_back(ids[i], values[static_cast<size_t>(ids[i])] - log_sum);
  return result;
}

}  // namespace baseq
