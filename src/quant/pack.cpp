#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <atomic>
#include <cstdint>

#include "baseq/quant/quantize.h"

namespace baseq {
namespace {

void check_bits(const char* who, int64_t num_bits) {
  TORCH_CHECK(num_bits >= 1 && num_bits <= 8, who, ": num_bits is ", num_bits, ", expected 1 to 8");
}

/// ceil(columns * num_bits / 32) for any number of columns from 0 on: the product may be more than 64 bits hold.
int64_t words_per_row(int64_t columns, int64_t num_bits) {
  return columns / 32 * num_bits + (columns % 32 * num_bits + 31) / 32;
}

}  // namespace

Tensor pack_to_int32(const Tensor& codes, int64_t num_bits) {
  check_bits("pack_to_int32", num_bits);
  TORCH_CHECK(codes.dim() == 2 && codes.scalar_type() == at::kChar, "pack_to_int32: codes are ", codes.scalar_type(),
              " of size ", codes.sizes(), ", expected int8 [rows, columns]");
  const Tensor source = codes.cpu().contiguous();
  const int64_t rows = source.size(0), columns = source.size(1), words = words_per_row(columns, num_bits);
  const Tensor packed = at::empty({rows, words}, at::kInt);
  const auto* code = source.const_data_ptr<int8_t>();
  auto* word = packed.mutable_data_ptr<int32_t>();
  const int32_t offset = 1 << (num_bits - 1);
  std::atomic<bool> out_of_range = false;
  at::parallel_for(0, rows, 1 + (1 << 16) / (columns + 1), [&](int64_t begin, int64_t end) {
    uint32_t overflow = 0;
    for (int64_t row = begin; row < end; ++row) {
      const int8_t* in = code + row * columns;
      int32_t* out = word + row * words;
      uint64_t buffer = 0;
      int64_t filled = 0;
      for (int64_t i = 0; i < columns; ++i) {
        const auto value = static_cast<uint32_t>(in[i] + offset);
        overflow |= value >> num_bits;
        buffer |= uint64_t{value} << filled;
        filled += num_bits;
        if (filled >= 32) {
          *out++ = static_cast<int32_t>(static_cast<uint32_t>(buffer));
          buffer >>= 32;
          filled -= 32;
        }
      }
      if (filled > 0) *out = static_cast<int32_t>(static_cast<uint32_t>(buffer));
    }
    if (overflow != 0) out_of_range = true;
  });
  TORCH_CHECK(!out_of_range, "pack_to_int32: a code lies outside [", -offset, ", ", offset - 1, "], the range of ",
              num_bits, " bits");
  return packed;
}

Tensor unpack_from_int32(const Tensor& packed, int64_t num_bits, int64_t columns) {
  check_bits("unpack_from_int32", num_bits);
  TORCH_CHECK(packed.dim() == 2 && packed.scalar_type() == at::kInt && columns >= 0 &&
                  packed.size(1) == words_per_row(columns, num_bits),
              "unpack_from_int32: packed is ", packed.scalar_type(), " of size ", packed.sizes(),
              ", expected int32 [rows, ", words_per_row(columns, num_bits), "] for ", columns, " columns of ", num_bits,
              " bits");
  const Tensor source = packed.cpu().contiguous();
  const int64_t rows = source.size(0), words = source.size(1);
  const Tensor codes = at::empty({rows, columns}, at::kChar);
  const auto* word = source.const_data_ptr<int32_t>();
  auto* code = codes.mutable_data_ptr<int8_t>();
  const int32_t offset = 1 << (num_bits - 1);
  const uint64_t mask = (uint64_t{1} << num_bits) - 1;
  at::parallel_for(0, rows, 1 + (1 << 16) / (columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int32_t* in = word + row * words;
      int8_t* out = code + row * columns;
      uint64_t buffer = 0;
      int64_t filled = 0;
      for (int64_t i = 0; i < columns; ++i) {
        if (filled < num_bits) {
          buffer |= uint64_t{static_cast<uint32_t>(*in++)} << filled;
          filled += 32;
        }
        out[i] = static_cast<int8_t>(static_cast<int32_t>(buffer & mask) - offset);
        buffer >>= num_bits;
        filled -= num_bits;
      }
    }
  });
  return codes;
}

Tensor pack_zero_points(const Tensor& zero_points, int64_t num_bits) {
  return pack_to_int32(zero_points.t().to(at::kChar), num_bits).t().contiguous();
}

Tensor unpack_zero_points(const Tensor& packed, int64_t num_bits, int64_t rows) {
  return unpack_from_int32(packed.t(), num_bits, rows).t().to(at::kFloat).contiguous();
}

}  // namespace baseq
