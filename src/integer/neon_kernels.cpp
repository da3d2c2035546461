#if defined(__aarch64__)

#include <arm_neon.h>
#include <sys/auxv.h>

#include <algorithm>
#include <cstring>

#include "panel_arithmetic.h"
#include "row_functions.h"

/// SDOT multiplies four signed bytes by four signed bytes and adds the products to an int32 lane. Codes of up to 7 bits
/// are the same number signed or unsigned; 128 is subtracted from 8-bit ones, and from their zero points.
namespace baseq {
namespace {

constexpr int kVectors = kPanelRows / 4;
/// Rows of activations whose sums stay in registers.
constexpr int kTileRows = 4;

template <int kBits>
void unpack_panel(const Panel& panel) {
  constexpr uint8_t kFlip = kBits == 8 ? 128 : 0;
  const int64_t chunks = panel.columns() / kChunkColumns;
  uint8_t* out = panel.low;
  for (int64_t c = 0; c < chunks; ++c) {
    const uint8_t* chunk = panel.chunks + c * kBits * kBlockBytes;
#pragma GCC unroll 8
    for (int slice = 0; slice < kSlicesPerChunk; ++slice, out += kBlockBytes) {
      for (int64_t i = 0; i < kBlockBytes; ++i) out[i] = unpacked_code(chunk, kBits, slice, i) ^ kFlip;
    }
  }
}

/// kRows rows of codes, planes counted, from row `row` of the activations on.
template <int kPlanes, int kRows>
__attribute__((target("arch=armv8.2-a+dotprod"))) void multiply_tile(const Panel& panel, int64_t row) {
  const WeightPanels& weights = panel.weights;
  const FactorPanels& up = weights.up;
  const int64_t slices = panel.slices_per_group(), stride = panel.columns();
  constexpr int64_t kTokens = kRows / kPlanes;
  float total[kTokens * kPanelRows] = {};
  for (int64_t r = 0; up.values != nullptr && r < kTokens; ++r) {
    factor_row(up, panel.index, panel.x.projected + (row + r) * up.columns, total + r * kPanelRows);
  }
  for (int64_t group = 0; group < weights.groups; ++group) {
    const int8_t* codes = panel.x.codes + row * kPlanes * stride + group * weights.group_columns;
    const uint8_t* bytes = panel.low + group * slices * kBlockBytes;
    int32x4_t sums[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) sums[r][v] = vdupq_n_s32(0);
    }
    for (int64_t slice = 0; slice < slices; ++slice, bytes += kBlockBytes, codes += kSliceColumns) {
      int8x16_t values[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) values[v] = vreinterpretq_s8_u8(vld1q_u8(bytes + 16 * v));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        int32_t four;
        std::memcpy(&four, codes + r * stride, sizeof(four));
        const int8x16_t broadcast = vreinterpretq_s8_s32(vdupq_n_s32(four));
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] = vdotq_s32(sums[r][v], values[v], broadcast);
      }
    }
    int32_t stored[kRows * kPanelRows];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) vst1q_s32(stored + r * kPanelRows + 4 * v, sums[r][v]);
    }
    for (int64_t r = 0; r < kTokens; ++r) {
      add_group<kPlanes>(panel, row + r, group, stored + r * kPlanes * kPanelRows, total + r * kPanelRows);
    }
  }
  for (int64_t r = 0; r < kTokens; ++r) store_row(panel, row + r, total + r * kPanelRows);
}

template <int kPlanes>
void multiply_rows(const Panel& panel) {
  constexpr int64_t kTokens = kTileRows / kPlanes;
  int64_t row = 0;
  for (; row + kTokens <= panel.x.rows; row += kTokens) multiply_tile<kPlanes, kTileRows>(panel, row);
  for (; row < panel.x.rows; ++row) multiply_tile<kPlanes, kPlanes>(panel, row);
}

void multiply(const WeightPanels& weights, const CodeRows& x, int64_t begin, int64_t end, void* scratch, float* y) {
  constexpr void (*kUnpack[])(const Panel&) = {unpack_panel<2>, unpack_panel<3>, unpack_panel<4>, unpack_panel<5>,
                                               unpack_panel<6>, unpack_panel<7>, unpack_panel<8>};
  for (int64_t index = begin; index < end; ++index) {
    const Panel panel = open_panel(weights, x, index, /*signed_codes=*/true, scratch, y);
    kUnpack[weights.num_bits - 2](panel);
    x.planes == 1 ? multiply_rows<1>(panel) : multiply_rows<2>(panel);
  }
}

void project(const FactorPanels& factors, const float* values, int64_t rows, float* out) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t panel = 0; panel < factors.panels; ++panel) {
      factor_row(factors, panel, values + row * factors.columns, out + (row * factors.panels + panel) * kPanelRows);
    }
  }
}

bool supported() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }

}  // namespace

const IntegerKernels kNeonKernels{"neon",
                                  supported,
                                  multiply,
                                  project,
                                  PortableRows::attend,
                                  PortableRows::rms_norm,
                                  PortableRows::silu_product,
                                  PortableRows::rope};

}  // namespace baseq

#endif
