#include "integer/integer_kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "integer/panel_arithmetic.h"
#include "random_panels.h"

namespace baseq {
namespace {

std::string name(const PanelShape& s) {
  return std::to_string(s.num_bits) + " bits, " + std::to_string(s.rows) + " rows, " + std::to_string(s.planes) +
         " planes, codes to " + std::to_string(s.max_code) + ", " + std::to_string(s.panels) + " panels, " +
         std::to_string(s.groups) + " groups of " + std::to_string(s.group_columns) + ", rank " +
         std::to_string(s.rank) + (s.extreme ? ", extreme" : "");
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

/// The exact sum of (weight code - zero point) * activation code of one group, plane and output.
int64_t exact_sum(const WeightPanels& w, const CodeRows& x, int64_t code_row, int64_t group, int64_t output) {
  const int64_t columns = w.groups * w.group_columns, row = output % kPanelRows;
  const uint8_t* panel = w.panels + output / kPanelRows * w.panel_bytes;
  const uint8_t* zeros = panel + w.groups * kPanelRows * bytes_of(w.scale_type);
  const uint8_t* chunks = panel + panel_header_bytes(w.groups, w.scale_type, w.zero_points);
  const int64_t zero = w.zero_points ? zeros[group * kPanelRows + row] : w.zero_point;
  int64_t sum = 0;
  for (int64_t k = group * w.group_columns; k < (group + 1) * w.group_columns; ++k) {
    const auto slice = static_cast<int>(k % kChunkColumns / kSliceColumns);
    const int64_t byte = row * kSliceColumns + k % kSliceColumns;
    const uint8_t* chunk = chunks + k / kChunkColumns * w.num_bits * kBlockBytes;
    sum += (unpacked_code(chunk, static_cast<int>(w.num_bits), slice, byte) - zero) * x.codes[code_row * columns + k];
  }
  return sum;
}

TEST(IntegerKernels, SumsOfOneGroupAreExact) {
  std::mt19937_64 random(11);
  for (int i = 0; i < 400; ++i) {
    PanelShape shape = random_shape(random);
    shape.groups = 1;
    shape.planes = 1;
    shape.rank = 0;
    shape.base = shape.bias = shape.scale_per_group = false;
    shape.extreme = i % 2 == 0;
    const RandomPanels operands(shape, i);
    CodeRows x = operands.codes();
    WeightPanels w = operands.weights();
    // One float product is left: the sum times the scale of its row.
    const std::vector<float> ones(shape.rows, 1.0F);
    x.scale = ones.data();
    for (int64_t k = 0; k < kNumIntegerKernels; ++k) {
      if (!kIntegerKernels[k]->supported()) continue;
      const Aligned<uint8_t> scratch(scratch_bytes(w, x));
      std::vector<float> y(shape.rows * w.out_features);
      kIntegerKernels[k]->multiply(w, x, 0, w.num_panels, scratch.get(), y.data());
      for (int64_t p = 0; p < w.num_panels; ++p) {
        const Panel panel = open_panel(w, x, p, /*signed_codes=*/false, scratch.get(), y.data());
        for (int64_t n = p * kPanelRows; n < std::min((p + 1) * kPanelRows, w.out_features); ++n) {
          for (int64_t row = 0; row < shape.rows; ++row) {
            const auto sum = static_cast<float>(exact_sum(w, x, row, 0, n));
            ASSERT_EQ(y[row * w.out_features + n], sum * panel.scales[n % kPanelRows])
                << kIntegerKernels[k]->name << ", " << name(shape);
          }
        }
      }
    }
  }
}

TEST(IntegerKernels, LargestGroupsDoNotOverflow) {
  for (const int64_t bits : {7, 8}) {
    const PanelShape shape{.num_bits = bits,
                           .rows = 7,
                           .max_code = 128,
                           .panels = 2,
                           .group_columns = kMaxGroupColumns,
                           .zero_points = true,
                           .extreme = true};
    const RandomPanels operands(shape, 1);
    const std::vector<float> expected = operands.multiply(kScalarKernels);
    const int64_t sum = exact_sum(operands.weights(), operands.codes(), 0, 0, 0);
    EXPECT_EQ(std::abs(sum), ((int64_t{1} << bits) - 1) * kMaxGroupColumns * (sum < 0 ? 128 : 127));
    for (int64_t k = 0; k < kNumIntegerKernels; ++k) {
      if (!kIntegerKernels[k]->supported()) continue;
      EXPECT_TRUE(same_bits(operands.multiply(*kIntegerKernels[k]), expected)) << kIntegerKernels[k]->name;
    }
  }
}

TEST(IntegerKernels, EveryInstructionSetComputesTheSameBits) {
  std::mt19937_64 random(12);
  for (int i = 0; i < 1500; ++i) {
    const PanelShape shape = random_shape(random);
    const RandomPanels operands(shape, i);
    const std::vector<float> expected = operands.multiply(kScalarKernels);
    for (int64_t k = 0; k < kNumIntegerKernels; ++k) {
      if (!kIntegerKernels[k]->supported()) continue;
      ASSERT_TRUE(same_bits(operands.multiply(*kIntegerKernels[k]), expected))
          << kIntegerKernels[k]->name << " differs: " << name(shape);
    }
  }
}

TEST(IntegerKernels, TheEnvironmentNamesTheInstructionSet) {
  EXPECT_EQ(setenv("BASEQ_KERNELS", "scalar", 1), 0);
  EXPECT_EQ(find_integer_kernels(), &kScalarKernels);
  EXPECT_EQ(setenv("BASEQ_KERNELS", "6502", 1), 0);
  EXPECT_EQ(find_integer_kernels(), nullptr);
  EXPECT_EQ(unsetenv("BASEQ_KERNELS"), 0);
  EXPECT_NE(find_integer_kernels(), nullptr);
}

}  // namespace
}  // namespace baseq
