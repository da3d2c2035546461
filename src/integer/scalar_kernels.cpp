#include "panel_arithmetic.h"
#include "row_functions.h"

/// The reference: every other instruction set computes the bits that these loops compute.
namespace baseq {
namespace {

void unpack(const Panel& panel) {
  const auto num_bits = static_cast<int>(panel.weights.num_bits);
  const int64_t slices = panel.columns() / kSliceColumns;
  for (int64_t slice = 0; slice < slices; ++slice) {
    const uint8_t* chunk = panel.chunks + slice / kSlicesPerChunk * num_bits * kBlockBytes;
    for (int64_t byte = 0; byte < kBlockBytes; ++byte) {
      panel.low[slice * kBlockBytes + byte] =
          unpacked_code(chunk, num_bits, static_cast<int>(slice % kSlicesPerChunk), byte);
    }
  }
}

void sum_group(const Panel& panel, const int8_t* codes, int64_t group, int32_t* sums) {
  const int64_t slices = panel.slices_per_group();
  const uint8_t* weights = panel.low + group * slices * kBlockBytes;
  codes += group * panel.weights.group_columns;
  for (int64_t i = 0; i < kPanelRows; ++i) sums[i] = 0;
  for (int64_t slice = 0; slice < slices; ++slice, weights += kBlockBytes, codes += kSliceColumns) {
    for (int64_t i = 0; i < kPanelRows; ++i) {
      for (int64_t c = 0; c < kSliceColumns; ++c) sums[i] += weights[i * kSliceColumns + c] * codes[c];
    }
  }
}

void multiply(const WeightPanels& weights, const CodeRows& x, int64_t begin, int64_t end, void* scratch, float* y) {
  for (int64_t index = begin; index < end; ++index) {
    const Panel panel = open_panel(weights, x, index, /*signed_codes=*/false, scratch, y);
    unpack(panel);
    for (int64_t row = 0; row < x.rows; ++row) {
      float total[kPanelRows] = {};
      int32_t sums[2 * kPanelRows];
      if (weights.up.values != nullptr) factor_row(weights.up, index, x.projected + row * weights.up.columns, total);
      const int8_t* codes = x.codes + row * x.planes * panel.columns();
      for (int64_t group = 0; group < weights.groups; ++group) {
        sum_group(panel, codes, group, sums);
        if (x.planes == 1) {
          add_group<1>(panel, row, group, sums, total);
        } else {
          sum_group(panel, codes + panel.columns(), group, sums + kPanelRows);
          add_group<2>(panel, row, group, sums, total);
        }
      }
      store_row(panel, row, total);
    }
  }
}

void project(const FactorPanels& factors, const float* values, int64_t rows, float* out) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t panel = 0; panel < factors.panels; ++panel) {
      factor_row(factors, panel, values + row * factors.columns, out + (row * factors.panels + panel) * kPanelRows);
    }
  }
}

}  // namespace

const IntegerKernels kScalarKernels{"scalar",
                                    [] { return true; },
                                    multiply,
                                    project,
                                    PortableRows::attend,
                                    PortableRows::rms_norm,
                                    PortableRows::silu_product,
                                    PortableRows::rope};

}  // namespace baseq
