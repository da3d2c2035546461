#include "baseq/quant/gptq_layout.h"

#include <ATen/ATen.h>

#include "baseq/quant/pack.h"

namespace baseq {
namespace {

constexpr int64_t kAwqBits = 4, kAwqOutputs = 8;  // eight outputs a word

void check_fills_words(const char* who, const char* what, int64_t count, int64_t num_bits) {
  TORCH_CHECK(count * num_bits % 32 == 0, who, ": ", count, " ", what, " of ", num_bits,
              " bits do not fill words of 32 bits");
}

/// Numbers that fit the last word: int32 [rows, words] -> int8 [rows, words * 32 / num_bits].
Tensor unpack_words(const Tensor& packed, int64_t num_bits) {
  TORCH_CHECK(packed.dim() == 2, "unpack: packed is of size ", packed.sizes(), ", expected two dimensions");
  return unpack_from_int32(packed, num_bits, packed.size(1) * 32 / num_bits);
}

/// [rows, columns] with every eight columns in the order of a word, or back.
Tensor permute_awq(const Tensor& values, std::initializer_list<int64_t> order) {
  const Tensor index = at::tensor(at::IntArrayRef(order.begin(), order.size()), at::kLong);
  return values.reshape({values.size(0), -1, kAwqOutputs}).index_select(2, index).view(values.sizes());
}

/// int8 [rows, outputs] -> int32 [rows, outputs / 8].
Tensor pack_awq(const char* who, const Tensor& values) {
  TORCH_CHECK(values.dim() == 2 && values.size(1) % kAwqOutputs == 0, who, ": ", values.size(-1),
              " outputs are no multiple of ", kAwqOutputs);
  return pack_to_int32(permute_awq(values, {0, 2, 4, 6, 1, 3, 5, 7}), kAwqBits);
}

Tensor unpack_awq(const Tensor& packed) {
  return permute_awq(unpack_words(packed, kAwqBits), {0, 4, 1, 5, 2, 6, 3, 7});
}

}  // namespace

Tensor pack_gptq_codes(const Tensor& codes, int64_t num_bits) {
  check_fills_words("pack_gptq_codes", "inputs", codes.size(-1), num_bits);
  return pack_to_int32(codes, num_bits).t().contiguous();
}

Tensor unpack_gptq_codes(const Tensor& qweight, int64_t num_bits) { return unpack_words(qweight.t(), num_bits); }

Tensor pack_gptq_zero_points(const Tensor& zero_point, int64_t num_bits, GptqVersion version) {
  check_fills_words("pack_gptq_zero_points", "outputs", zero_point.size(0), num_bits);
  const Tensor stored = zero_point.t() - (version == GptqVersion::kV1 ? 1 : 0);
  return pack_to_int32(stored.to(at::kChar), num_bits);
}

Tensor unpack_gptq_zero_points(const Tensor& qzeros, int64_t num_bits, GptqVersion version) {
  const Tensor stored = unpack_words(qzeros, num_bits).t().to(at::kFloat);
  return (stored + (version == GptqVersion::kV1 ? 1 : 0)).contiguous();
}

Tensor pack_awq_codes(const Tensor& codes) { return pack_awq("pack_awq_codes", codes.t()); }

Tensor unpack_awq_codes(const Tensor& qweight) { return unpack_awq(qweight).t().contiguous(); }

Tensor pack_awq_zero_points(const Tensor& zero_point) {
  return pack_awq("pack_awq_zero_points", zero_point.t().to(at::kChar));
}

Tensor unpack_awq_zero_points(const Tensor& qzeros) { return unpack_awq(qzeros).t().to(at::kFloat).contiguous(); }

}  // namespace baseq
