// Functions over tensors from headers of their own, which need neither a model nor a recipe.
#include <baseq/quant/gptq.h>
#include <baseq/quant/low_rank.h>
#include <baseq/quant/quantize.h>
#include <baseq/transform/hadamard.h>

/// A weight for inputs that a Hadamard transform has passed: packed to 4 bits, unpacked, with a correction of rank 8.
at::Tensor rotated_weight(const at::Tensor& weight, const at::Tensor& inputs) {
  const at::Tensor w = baseq::hadamard_transform(weight);
  const at::Tensor moments = baseq::second_moments(baseq::hadamard_transform(inputs));
  baseq::QuantizedWeight rounded =
      baseq::gptq(w, moments, {.num_bits = 4, .strategy = baseq::Strategy::kGroup, .group_size = 64}).weight;
  rounded.codes = baseq::unpack_from_int32(baseq::pack_to_int32(rounded.codes, 4), 4, w.size(1));
  const auto best = baseq::reconstruct_error(w.sub(rounded.dequantized()), moments, 8);
  return rounded.dequantized().add(baseq::store_factors(best.A, best.B, at::kBFloat16).product());
}
