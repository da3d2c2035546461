#pragma once

#include <bit>
#include <cstdint>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "integer/integer_kernels.h"

/// Random operands of the integer kernels. Any packed bytes are codes of some weight, so panels are just random bytes.
namespace baseq {

struct PanelShape {
  int64_t num_bits = 4, rows = 1, planes = 1, max_code = 15, panels = 1, groups = 1, group_columns = 32, rank = 0;
  StoredType scale_type = StoredType::kFloat, factor_type = StoredType::kBFloat16;
  bool zero_points = false, scale_per_group = false, base = false, bias = false;
  bool extreme = false;  ///< only the smallest and the largest codes and zero points
  int64_t missing = 0;   ///< rows of the last panel that do not exist
};

template <class T>
class Aligned {
 public:
  explicit Aligned(int64_t count) : values_(new (std::align_val_t{64}) T[count > 0 ? count : 1]{}) {}
  T* get() const { return values_.get(); }

 private:
  struct Free {
    void operator()(T* values) const { ::operator delete[](values, std::align_val_t{64}); }
  };
  std::unique_ptr<T[], Free> values_;
};

class RandomPanels {
 public:
  RandomPanels(const PanelShape& shape, uint64_t seed)
      : random_(seed), panels_(0), codes_(shape.rows * shape.planes * shape.groups * shape.group_columns) {
    fill_weights(shape);
    fill_codes(shape);
  }
  const WeightPanels& weights() const { return weights_; }
  const CodeRows& codes() const { return rows_; }

  /// The product by `kernels`, panels in two calls.
  std::vector<float> multiply(const IntegerKernels& kernels) const {
    const Aligned<uint8_t> scratch(scratch_bytes(weights_, rows_));
    std::vector<float> y(rows_.rows * weights_.out_features, -1);
    std::vector<float> projected(rows_.rows * weights_.up.columns);
    CodeRows rows = rows_;
    if (weights_.up.values != nullptr) {
      kernels.project(down_, values_.data(), rows.rows, projected.data());
      rows.projected = projected.data();
    }
    const int64_t middle = weights_.num_panels / 2;
    kernels.multiply(weights_, rows, 0, middle, scratch.get(), y.data());
    kernels.multiply(weights_, rows, middle, weights_.num_panels, scratch.get(), y.data());
    return y;
  }

 private:
  float value() { return std::uniform_real_distribution<float>(-1, 1)(random_); }
  std::vector<float> values(int64_t count) {
    std::vector<float> result(count);
    for (float& v : result) v = value();
    return result;
  }
  uint64_t below(uint64_t limit) { return random_() % limit; }

  void fill_weights(const PanelShape& shape) {
    const int64_t columns = shape.groups * shape.group_columns, count = shape.groups * kPanelRows;
    const int64_t header = panel_header_bytes(shape.groups, shape.scale_type, shape.zero_points);
    const int64_t code_bytes = panel_code_bytes(columns, shape.num_bits), scale_bytes = bytes_of(shape.scale_type);
    const int64_t panel_bytes = header + code_bytes;
    panels_ = Aligned<uint8_t>(shape.panels * panel_bytes);
    for (int64_t p = 0; p < shape.panels; ++p) {
      uint8_t* bytes = panels_.get() + p * panel_bytes;
      for (int64_t i = 0; i < code_bytes; ++i) {
        bytes[header + i] = static_cast<uint8_t>(shape.extreme ? (p % 2 == 0 ? 0xff : 0) : below(256));
      }
      for (int64_t i = 0; i < count; ++i) store(bytes + i * scale_bytes, shape.scale_type, value());
      for (int64_t i = 0; shape.zero_points && i < count; ++i) {
        const uint64_t top = (uint64_t{1} << shape.num_bits) - 1;
        bytes[count * scale_bytes + i] = static_cast<uint8_t>(shape.extreme ? (p % 2 == 0 ? 0 : top) : below(top + 1));
      }
    }
    row_sums_ = values(shape.panels * kPanelRows);
    bias_ = values(shape.panels * kPanelRows);
    weights_ = {.panels = panels_.get(),
                .panel_bytes = panel_bytes,
                .num_panels = shape.panels,
                .num_bits = shape.num_bits,
                .out_features = shape.panels * kPanelRows - shape.missing,
                .groups = shape.groups,
                .group_columns = shape.group_columns,
                .scale_type = shape.scale_type,
                .zero_points = shape.zero_points,
                .zero_point = 1 << (shape.num_bits - 1),
                .row_sums = row_sums_.data(),
                .bias = shape.bias ? bias_.data() : nullptr,
                .up = {}};
    if (shape.rank > 0) {
      const int64_t rank_panels = (shape.rank + kPanelRows - 1) / kPanelRows;
      down_ = factors(down_values_, shape.factor_type, rank_panels, columns);
      weights_.up = factors(up_values_, shape.factor_type, shape.panels, rank_panels * kPanelRows);
      values_ = values(shape.rows * columns);
    }
  }

  void fill_codes(const PanelShape& shape) {
    const int64_t columns = shape.groups * shape.group_columns;
    const auto low = shape.max_code == 15 ? -15 : -128, high = shape.max_code == 15 ? 15 : 127;
    sums_.assign(shape.rows * shape.planes * shape.groups, 0);
    for (int64_t row = 0; row < shape.rows * shape.planes; ++row) {
      const bool lowest = below(2) == 0;
      for (int64_t k = 0; k < columns; ++k) {
        const auto code = shape.extreme ? (lowest ? low : high) : low + static_cast<int>(below(high - low + 1));
        codes_.get()[row * columns + k] = static_cast<int8_t>(code);
        sums_[row * shape.groups + k / shape.group_columns] += code;
      }
    }
    scale_ = values(shape.rows * (shape.scale_per_group ? shape.groups : 1));
    base_ = values(shape.rows);
    rows_ = {.rows = shape.rows,
             .planes = shape.planes,
             .max_code = shape.max_code,
             .codes = codes_.get(),
             .sums = sums_.data(),
             .scale = scale_.data(),
             .scales_per_row = shape.scale_per_group ? shape.groups : 1,
             .base = shape.base ? base_.data() : nullptr,
             .projected = nullptr};
  }

  FactorPanels factors(Aligned<uint8_t>& memory, StoredType type, int64_t panels, int64_t columns) {
    const int64_t count = panels * columns * kPanelRows;
    memory = Aligned<uint8_t>(count * bytes_of(type));
    for (int64_t i = 0; i < count; ++i) store(memory.get() + i * bytes_of(type), type, value());
    return {memory.get(), type, panels, columns};
  }

  static void store(uint8_t* bytes, StoredType type, float value) {
    const auto write = [&](auto stored) {
      for (size_t i = 0; i < sizeof(stored); ++i) bytes[i] = static_cast<uint8_t>(uint64_t{stored} >> (8 * i));
    };
    const auto bits = std::bit_cast<uint32_t>(value);
    if (type == StoredType::kFloat) write(bits);
    if (type == StoredType::kBFloat16) write(static_cast<uint16_t>(bits >> 16));
    // Exponents below 2^-14 become float16's denormal numbers of other values.
    if (type == StoredType::kHalf) write(static_cast<uint16_t>((bits >> 16 & 0x8000U) | (bits >> 13 & 0x3fffU)));
    if (type == StoredType::kInt8) write(static_cast<uint8_t>(bits >> 8));
  }

  std::mt19937_64 random_;
  Aligned<uint8_t> panels_;
  Aligned<int8_t> codes_;
  Aligned<uint8_t> down_values_{0}, up_values_{0};
  std::vector<float> row_sums_, bias_, scale_, base_, values_;
  std::vector<int32_t> sums_;
  WeightPanels weights_;
  CodeRows rows_;
  FactorPanels down_;
};

/// A random shape of any width; a tenth of them with extreme codes.
inline PanelShape random_shape(std::mt19937_64& random) {
  const auto below = [&](int64_t limit) { return static_cast<int64_t>(random() % static_cast<uint64_t>(limit)); };
  PanelShape shape;
  shape.num_bits = 2 + below(7);
  shape.planes = 1 + below(2);
  shape.max_code = shape.planes == 2 || below(2) == 0 ? 128 : 15;
  shape.rows = 1 + below(15);
  shape.panels = 1 + below(4);
  shape.groups = 1 + below(5);
  shape.group_columns = kChunkColumns * (1 + below(below(4) == 0 ? 12 : 3));
  shape.rank = below(2) == 0 ? 0 : 1 + below(40);
  shape.scale_type = static_cast<StoredType>(below(3));
  constexpr StoredType kFactorTypes[] = {StoredType::kFloat, StoredType::kBFloat16, StoredType::kInt8};
  shape.factor_type = kFactorTypes[below(3)];
  shape.zero_points = below(2) == 0;
  shape.scale_per_group = below(2) == 0;
  shape.base = below(2) == 0;
  shape.bias = below(2) == 0;
  shape.extreme = below(10) == 0;
  shape.missing = below(kPanelRows);
  return shape;
}

}  // namespace baseq
