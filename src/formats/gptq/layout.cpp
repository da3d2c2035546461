#include "formats/gptq/layout.h"

#include <ATen/ATen.h>

#include "baseq/quant/quantize.h"

namespace baseq {
namespace {

constexpr int64_t kAwqOutputs = 8;  // per word

/// [rows, columns] with every eight columns in the order of a word, or back.
Tensor permute_awq(const Tensor& values, std::initializer_list<int64_t> order) {
  const Tensor index = at::tensor(at::IntArrayRef(order.begin(), order.size()), at::kLong);
  return values.reshape({values.size(0), -1, kAwqOutputs}).index_select(2, index).view(values.sizes());
}

}  // namespace

/// int8 [rows, columns] -> int32 [rows, words].
Tensor PackedLayout::pack(const char* what, const Tensor& values) const {
  TORCH_CHECK(values.dim() == 2 && values.size(1) * num_bits % 32 == 0, awq ? "awq" : "gptq", ": ", values.size(-1),
              " ", what, " of ", num_bits, " bits do not fill words of 32 bits");
  return pack_to_int32(awq ? permute_awq(values, {0, 2, 4, 6, 1, 3, 5, 7}) : values, num_bits);
}

Tensor PackedLayout::unpack(const Tensor& words) const {
  TORCH_CHECK(words.dim() == 2, "unpack: packed is of size ", words.sizes(), ", expected two dimensions");
  const Tensor values = unpack_from_int32(words, num_bits, per_words(words.size(1)));
  return awq ? permute_awq(values, {0, 4, 1, 5, 2, 6, 3, 7}) : values;
}

Tensor PackedLayout::pack_codes(const Tensor& codes) const {
  return awq ? pack("outputs", codes.t()) : pack("inputs", codes).t().contiguous();
}

Tensor PackedLayout::unpack_codes(const Tensor& qweight) const {
  return awq ? unpack(qweight).t().contiguous() : unpack(qweight.t());
}

Tensor PackedLayout::pack_zero_points(const Tensor& zero_point) const {
  const Tensor stored = zero_point.t() - (!awq && version == 1 ? 1 : 0);
  return pack("outputs", stored.to(at::kChar));
}

Tensor PackedLayout::unpack_zero_points(const Tensor& qzeros) const {
  return (unpack(qzeros).t().to(at::kFloat) + (!awq && version == 1 ? 1 : 0)).contiguous();
}

std::vector<int64_t> PackedLayout::qweight_shape(int64_t out_features, int64_t in_features) const {
  if (awq) return {in_features, out_features * num_bits / 32};
  return {in_features * num_bits / 32, out_features};
}

std::vector<int64_t> PackedLayout::codes_shape(const std::vector<int64_t>& qweight) const {
  if (awq) return {per_words(qweight[1]), qweight[0]};
  return {qweight[1], per_words(qweight[0])};
}

}  // namespace baseq
