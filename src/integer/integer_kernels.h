#pragma once

#include <cstdint>

#include "attention_kernels.h"

/// Products of quantized weights with quantized activations: exact integer sums, then float operations in one order.
/// docs/arithmetic.md defines the results to the bit. Plain pointers, so that the kernels compile without LibTorch.
namespace baseq {

/// Weights are stored in panels of this many rows.
constexpr int64_t kPanelRows = 16;
/// Columns of a row that lie side by side: 4 x 16 codes are a slice of 64 bytes once they are unpacked.
constexpr int64_t kSliceColumns = 4;
/// A chunk is 8 slices. At b bits it takes b blocks of 64 bytes. Groups are padded to whole chunks.
constexpr int64_t kChunkColumns = 32;
constexpr int64_t kSlicesPerChunk = kChunkColumns / kSliceColumns;
constexpr int64_t kBlockBytes = kPanelRows * kSliceColumns;
/// More columns in a group could overflow the sums: 255 * 128 * 65536 < 2^31.
constexpr int64_t kMaxGroupColumns = 65536;

enum class StoredType : uint8_t { kFloat, kBFloat16, kHalf, kInt8 };
constexpr int64_t bytes_of(StoredType type) {
  return type == StoredType::kFloat ? 4 : type == StoredType::kInt8 ? 1 : 2;
}

/// A matrix of float factors in panels: `[panels, columns, 16]`, columns a multiple of 4.
struct FactorPanels {
  const void* values = nullptr;
  StoredType type = StoredType::kFloat;
  int64_t panels = 0, columns = 0;
};

/// Weight (code - zero point) * scale, with codes from 0 to 2^b - 1. A panel holds its scales [groups, 16] in their
/// stored type, its zero points uint8 [groups, 16] and, from a multiple of 64 bytes on, its chunks: read from its start
/// to its end, panels are one stream. A panel starts at a multiple of 64 bytes.
struct WeightPanels {
  const uint8_t* panels = nullptr;
  int64_t panel_bytes = 0, num_panels = 0;
  int64_t num_bits = 4, out_features = 0;
  int64_t groups = 1, group_columns = 0;  ///< columns of a group with their padding
  StoredType scale_type = StoredType::kFloat;
  bool zero_points = false;         ///< in the panels
  int32_t zero_point = 0;           ///< that of all codes otherwise
  const float* row_sums = nullptr;  ///< [panels * 16], sum of a row's weights
  const float* bias = nullptr;      ///< [panels * 16] or null
  FactorPanels up;                  ///< B of a low-rank correction, [panels of rows, rank, 16]; no values: none
};
/// Bytes of a panel before its chunks.
constexpr int64_t panel_header_bytes(int64_t groups, StoredType scale_type, bool zero_points) {
  const int64_t bytes = groups * kPanelRows * (bytes_of(scale_type) + (zero_points ? 1 : 0));
  return (bytes + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
}
/// Bytes of its chunks.
constexpr int64_t panel_code_bytes(int64_t columns, int64_t num_bits) {
  return columns / kChunkColumns * num_bits * kBlockBytes;
}

/// Activation code * scale + base. With two planes, the code is 128 * first + second.
struct CodeRows {
  int64_t rows = 0, planes = 1;
  int64_t max_code = 128;         ///< largest magnitude: 15 or 128
  const int8_t* codes = nullptr;  ///< [rows, planes, groups * group_columns], zeros as padding
  const int32_t* sums = nullptr;  ///< [rows, planes, groups]
  const float* scale = nullptr;   ///< [rows, groups], or [rows] when scales_per_row is 1
  int64_t scales_per_row = 1;
  const float* base = nullptr;       ///< [rows] or null
  const float* projected = nullptr;  ///< [rows, rank]: A x of a low-rank correction
};

/// Bytes of the memory that a thread needs for a product, at a multiple of 64 bytes.
int64_t scratch_bytes(const WeightPanels& weights, const CodeRows& x);

struct IntegerKernels {
  const char* name;
  bool (*supported)();
  /// y[row, 16 p + i] for panels p of [begin, end): y is [rows, out_features].
  void (*multiply)(const WeightPanels& weights, const CodeRows& x, int64_t begin, int64_t end, void* scratch, float* y);
  /// out[row, 16 p + i] = sum of factors * values over the columns. values [rows, columns], out [rows, panels * 16].
  void (*project)(const FactorPanels& factors, const float* values, int64_t rows, float* out);
  /// attention_kernels.h; scratch of attention_scratch_bytes().
  void (*attend)(const AttentionRows& task, void* scratch);
  /// rows.h, one row or head.
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* y);
  void (*silu_product)(const float* gate, const float* up, const float* factor, int64_t n, float* y);
  void (*rope)(float* x, const float* cos, const float* sin, int64_t half);
};
/// The best first, the scalar reference last.
extern const IntegerKernels* const kIntegerKernels[];
extern const int64_t kNumIntegerKernels;

/// The kernels that the library uses: the first supported ones, or those that the environment variable BASEQ_KERNELS
/// names. Null if the variable names no supported kernels.
const IntegerKernels* find_integer_kernels();

extern const IntegerKernels kScalarKernels;
#if defined(__x86_64__)
extern const IntegerKernels kAvx2Kernels;
#if !defined(__clang__)
extern const IntegerKernels kAvx512PairsKernels, kAvx512Kernels, kAvxVnniKernels;
#endif
#elif defined(__aarch64__)
extern const IntegerKernels kNeonKernels;
#endif

}  // namespace baseq
