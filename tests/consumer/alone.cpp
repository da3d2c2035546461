// Functions over tensors from headers of their own, which need neither a model nor a recipe.
#include <baseq/quant/decode.h>
#include <baseq/quant/gptq.h>
#include <baseq/quant/low_rank.h>
#include <baseq/transform/hadamard.h>

/// A linear for inputs that a Hadamard transform has passed, with a correction of rank 8.
baseq::PackedLinear rotated_linear(const at::Tensor& weight, const at::Tensor& inputs) {
  const at::Tensor w = baseq::hadamard_transform(weight);
  const at::Tensor moments = baseq::second_moments(baseq::hadamard_transform(inputs));
  const baseq::QuantizedWeight rounded =
      baseq::gptq(w, moments, {.num_bits = 4, .strategy = baseq::Strategy::kGroup, .group_size = 64}).weight;
  const at::Tensor error = w.sub(rounded.dequantized());
  const auto correction = baseq::reconstruct_error(error, moments, 8);
  return baseq::pack_linear(rounded, baseq::store_factors(correction.A, correction.B, at::kBFloat16));
}
