#include <ATen/ATen.h>

#include <cmath>
#include <numbers>

#include "baseq/model/decoder_layer.h"

namespace baseq {
namespace {

/// 0, 2/dim, 4/dim, ... float32.
Tensor exponents(int64_t dim) { return at::arange(0, dim, 2, at::kLong).to(at::kFloat) / dim; }

Tensor default_frequencies(double theta, int64_t dim) {
  return at::pow(at::Scalar(theta), exponents(dim)).reciprocal();
}

/// The base grows with the length once that is beyond the trained one.
Tensor dynamic_frequencies(const RopeParameters& rope, int64_t dim, int64_t trained, int64_t seq_len) {
  if (seq_len <= trained) return default_frequencies(rope.theta, dim);
  // float32 from here on, where transformers has a tensor as well.
  const Tensor length = at::scalar_tensor(static_cast<double>(seq_len), at::kFloat);
  const Tensor stretch = length * rope.factor / trained - (rope.factor - 1);
  const Tensor base = at::pow(stretch, static_cast<double>(dim) / static_cast<double>(dim - 2)) * rope.theta;
  return at::pow(base, exponents(dim)).reciprocal();
}

/// Long wavelengths are stretched by the factor, short ones kept, those between interpolated.
Tensor llama3_frequencies(const RopeParameters& rope, int64_t dim) {
  const Tensor inverse = default_frequencies(rope.theta, dim);
  const auto trained = static_cast<double>(rope.original_max_position_embeddings);
  const Tensor wavelength = inverse.reciprocal() * (2 * std::numbers::pi);
  const Tensor low = wavelength > trained / rope.low_freq_factor;
  const Tensor high = wavelength < trained / rope.high_freq_factor;
  const Tensor scaled = at::where(low, inverse / rope.factor, inverse);
  const Tensor smooth =
      (wavelength.reciprocal() * trained - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
  const Tensor between = (1 - smooth) * scaled / rope.factor + smooth * scaled;
  return at::where(at::logical_or(low, high), scaled, between);
}

double yarn_attention_factor(const RopeParameters& rope) {
  if (rope.attention_factor) return *rope.attention_factor;
  const auto scale = [&](double mscale) { return rope.factor <= 1 ? 1.0 : 0.1 * mscale * std::log(rope.factor) + 1.0; };
  const bool both = rope.mscale.value_or(0) != 0 && rope.mscale_all_dim.value_or(0) != 0;
  return both ? scale(*rope.mscale) / scale(*rope.mscale_all_dim) : scale(1.0);
}

/// Frequencies that turn often in the trained context are kept, those that turn seldom interpolated.
Tensor yarn_frequencies(const RopeParameters& rope, int64_t dim) {
  const auto dimension_of = [&](double rotations) {  // which frequency turns that often in the trained context
    const auto trained = static_cast<double>(rope.original_max_position_embeddings);
    const double turns = std::log(trained / (rotations * 2 * std::numbers::pi));
    return static_cast<double>(dim) * turns / (2 * std::log(rope.theta));
  };
  double low = dimension_of(rope.beta_fast), high = dimension_of(rope.beta_slow);
  if (rope.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, static_cast<double>(dim - 1));
  if (low == high) high += 0.001;
  const Tensor kept = 1 - ((at::arange(dim / 2, at::kFloat) - low) / (high - low)).clamp(0, 1);
  const Tensor powers = at::pow(at::Scalar(rope.theta), exponents(dim));
  return (powers * rope.factor).reciprocal() * (1 - kept) + powers.reciprocal() * kept;
}

double longrope_attention_factor(const RopeParameters& rope) {
  if (rope.attention_factor) return *rope.attention_factor;
  if (rope.factor <= 1) return 1.0;
  return std::sqrt(1 + std::log(rope.factor) / std::log(static_cast<double>(rope.original_max_position_embeddings)));
}

Tensor longrope_frequencies(const RopeParameters& rope, int64_t dim, int64_t seq_len) {
  const auto& divisors = seq_len > rope.original_max_position_embeddings ? rope.long_factor : rope.short_factor;
  return (at::tensor(divisors, at::kFloat) * at::pow(at::Scalar(rope.theta), exponents(dim))).reciprocal();
}

}  // namespace

int64_t rotary_dim(const RopeParameters& rope, int64_t head_dim) {
  return static_cast<int64_t>(static_cast<double>(head_dim) * rope.partial_rotary_factor);
}

RotaryFrequencies rotary_frequencies(const RopeParameters& rope, int64_t head_dim, int64_t max_position_embeddings,
                                     int64_t seq_len) {
  using Type = RopeParameters::Type;
  const int64_t dim = rotary_dim(rope, head_dim);
  switch (rope.type) {
    case Type::kDefault:
      return {default_frequencies(rope.theta, dim)};
    case Type::kLinear:
      return {default_frequencies(rope.theta, dim) / rope.factor};
    case Type::kDynamic:
      return {dynamic_frequencies(rope, dim, max_position_embeddings, seq_len)};
    case Type::kLlama3:
      return {llama3_frequencies(rope, dim)};
    case Type::kYarn:
      return {yarn_frequencies(rope, dim), yarn_attention_factor(rope)};
    case Type::kLongrope:
      return {longrope_frequencies(rope, dim, seq_len), longrope_attention_factor(rope)};
  }
  TORCH_INTERNAL_ASSERT(false, "unknown rope type");
}

RotaryEmbedding RotaryEmbedding::create(const ModelConfig& config, int64_t seq_len, const at::TensorOptions& options) {
  return create(rotary_frequencies(config.rope, config.head_dim, config.max_position_embeddings, seq_len), 0, seq_len,
                options);
}

RotaryEmbedding RotaryEmbedding::create(const RotaryFrequencies& frequencies, int64_t first, int64_t count,
                                        const at::TensorOptions& options) {
  const Tensor angles = at::outer(at::arange(first, first + count, at::kFloat), frequencies.inverse).repeat({1, 2});
  Tensor cos = at::cos(angles), sin = at::sin(angles);
  if (frequencies.attention_factor != 1) {
    cos.mul_(frequencies.attention_factor);
    sin.mul_(frequencies.attention_factor);
  }
  return {cos.to(options), sin.to(options)};
}

Tensor RotaryEmbedding::forward(const Tensor& x) const {
  const auto seq = x.size(1), rotary_dim = cos.size(1);
  const auto table = [&](const Tensor& t) { return t.narrow(0, 0, seq).unsqueeze(1); };  // [seq, 1, rotary_dim]
  const auto turn = [&](const Tensor& part) {
    const auto halves = part.chunk(2, /*dim=*/-1);
    return part * table(cos) + at::cat({-halves[1], halves[0]}, /*dim=*/-1) * table(sin);
  };
  if (rotary_dim == x.size(-1)) return turn(x);
  return at::cat({turn(x.narrow(-1, 0, rotary_dim)), x.narrow(-1, rotary_dim, x.size(-1) - rotary_dim)}, /*dim=*/-1);
}

}  // namespace baseq
