#pragma once

#include <cstdint>

#include "baseq/tensor.h"

/// The inner loops of decode_linear, in one version for each instruction set.
namespace baseq {

/// Packed rows are read in blocks of DecodeKernels::lanes lanes, each with this many neighbouring codes.
constexpr int64_t codes_per_lane(int64_t num_bits) { return num_bits <= 4 ? 8 : 4; }
/// Rows that are read side by side, so that each load of x, which may be longer than what the first cache holds, serves
/// all of them: as many as the registers of the instruction set allow.
constexpr int64_t rows_together(int64_t lanes) { return lanes / 4; }
/// What a code stands above in the sums: codes are read as 2^b + (code + 2^(b-1)), between 2^b and 2^(b+1).
constexpr float code_offset(int64_t num_bits) { return static_cast<float>(int64_t{3} << (num_bits - 1)); }

enum class ScaleType { kFloat, kBFloat16, kHalf };
enum class FactorType { kBFloat16, kInt8 };
constexpr int64_t factors_in_word(FactorType type) { return type == FactorType::kInt8 ? 4 : 2; }
/// Factors are multiplied in steps of a word for each lane; what is shorter in steps of half as many lanes, down to
/// this.
constexpr int64_t kNarrowestLanes = 4;

/// y = dequantize(packed) x + bias + B t for one token. Columns beyond the last one are zeros in x.
struct DecodeRows {
  int64_t num_bits = 0;
  int64_t blocks = 0;                ///< of lanes * codes_per_lane columns
  const uint32_t* packed = nullptr;  ///< [rows, words]
  const uint32_t* packed_end = nullptr;
  int64_t words = 0;
  const float* x = nullptr;        ///< [blocks, codes_per_lane, lanes]
  const float* x_start = nullptr;  ///< [blocks, lanes], -code_offset times the sum over a lane's columns
  ScaleType scale_type = ScaleType::kFloat;
  const void* scale = nullptr;           ///< [rows, groups]; [1, 1] when one_scale
  const uint32_t* zero_point = nullptr;  ///< [ceil(rows * num_bits / 32), groups], packed along the rows, or null
  const float* group_sums = nullptr;     ///< [groups], sums of x; needed with zero_point
  int64_t groups = 1, lanes_per_group = 0;
  bool one_scale = false;
  FactorType factor_type = FactorType::kBFloat16;
  const void* lora_b = nullptr;  ///< [rows, rank]
  const float* t = nullptr;      ///< [rank], in factor_order
  int64_t rank = 0;
  const float* bias = nullptr;  ///< [rows] or null
  float* y = nullptr;           ///< [rows]
};

/// The order in which factors meet x: the first of each of `lanes` words, then the second ...; so for every step.
void factor_order(FactorType type, const float* x, int64_t n, int64_t lanes, float* out);

struct DecodeKernels {
  const char* name;
  int64_t lanes;
  bool (*supported)();
  /// Rows `begin` to `end` of y; `scratch` [groups + rows_together(lanes) * (blocks + 1) * lanes].
  void (*decode)(const DecodeRows& rows, int64_t begin, int64_t end, float* scratch);
  /// out[r] = a[r] x for rows `begin` to `end` of the matrix a [rows, columns], x in factor_order.
  void (*project)(FactorType type, const void* a, const float* x, int64_t columns, int64_t begin, int64_t end,
                  float* out);
};

/// From the widest instruction set to the one that every processor has.
extern const DecodeKernels kDecodeKernels[];
extern const int64_t kNumDecodeKernels;

/// The first that this processor supports.
const DecodeKernels& decode_kernels();

struct PackedLinear;
/// decode_linear of decode.h by these kernels.
Tensor decode_linear(const PackedLinear& linear, const Tensor& x, const DecodeKernels& kernels);

}  // namespace baseq
