#include "int8_product.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "exact_product.h"
#include "integer/registers.h"

namespace baseq {
namespace {

constexpr int64_t kLanes = 16;  // columns of a register
constexpr int64_t kGroup = 4;   // codes of a column that one instruction takes
// Rows by registers of columns: 24 sums stay in registers.
constexpr int64_t kRows = 6, kSets = 4;

#if defined(__x86_64__) && !defined(__clang__)
/// One product of packed weights: `sets` registers of columns.
struct Block {
  const uint8_t* a;
  const int8_t* packed;
  const int32_t* start;
  int32_t* out;
  int64_t depth, columns, stored;  ///< `stored` of the columns from `out` on exist
};

template <int kBlockRows, int kBlockSets>
[[gnu::always_inline]] inline void add_products(const Block& block) {
  using Isa = Avx512Registers;
  const int64_t groups = (block.depth + kGroup - 1) / kGroup;
  Isa::Ints sums[kBlockRows * kBlockSets];
  repeat<kBlockSets>([&](auto s) __attribute__((always_inline)) {
    const auto first = *reinterpret_cast<const Isa::Ints*>(block.start + s * kLanes);
    repeat<kBlockRows>([&](auto r) __attribute__((always_inline)) { sums[r * kBlockSets + s] = first; });
  });
  for (int64_t g = 0; g < groups; ++g) {
    Isa::Words weights[kBlockSets];
    repeat<kBlockSets>([&](auto s) __attribute__((always_inline)) {
      weights[s] = *reinterpret_cast<const Isa::Words*>(block.packed + (s * groups + g) * kLanes * kGroup);
    });
    repeat<kBlockRows>([&](auto r) __attribute__((always_inline)) {
      const Isa::Words codes = Isa::broadcast(block.a + r * block.depth + g * kGroup);
      repeat<kBlockSets>([&](auto s)
                             __attribute__((always_inline)) { Isa::dot(sums[r * kBlockSets + s], codes, weights[s]); });
    });
  }
  repeat<kBlockSets>([&](auto s) __attribute__((always_inline)) {
    const int64_t rest = std::min(kLanes, block.stored - s * kLanes);
    repeat<kBlockRows>([&](auto r) __attribute__((always_inline)) {
      int32_t* out = block.out + r * block.columns + s * kLanes;
      if (rest == kLanes) {
        *reinterpret_cast<Isa::Ints*>(out) = sums[r * kBlockSets + s];
      } else {
        const Isa::Ints kept = sums[r * kBlockSets + s];
        std::memcpy(out, &kept, static_cast<size_t>(rest) * sizeof(int32_t));
      }
    });
  });
}

template <int kBlockRows, int kBlockSets>
__attribute__((target("avx512f,avx512bw,avx512vnni,fma"))) void multiply_block(const Block& block) {
  add_products<kBlockRows, kBlockSets>(block);
}

using MultiplyBlock = void (*)(const Block&);
template <int kBlockRows>
constexpr MultiplyBlock kOfRows[] = {multiply_block<kBlockRows, 1>, multiply_block<kBlockRows, 2>,
                                     multiply_block<kBlockRows, 3>, multiply_block<kBlockRows, 4>};
constexpr const MultiplyBlock* kBlocks[kRows] = {kOfRows<1>, kOfRows<2>, kOfRows<3>,
                                                 kOfRows<4>, kOfRows<5>, kOfRows<6>};

void multiply_packed(const uint8_t* a, const int8_t* packed, const int32_t* start, int64_t rows, int64_t columns,
                     int64_t depth, int32_t* out) {
  const int64_t groups = (depth + kGroup - 1) / kGroup, all_sets = (columns + kLanes - 1) / kLanes;
  for (int64_t set = 0; set < all_sets; set += kSets) {
    const int64_t sets = std::min(kSets, all_sets - set);
    for (int64_t row = 0; row < rows;) {
      // The last rows are shared out evenly: 8 are 4 and 4, not 6 and 2.
      const int64_t left = rows - row;
      const int64_t take = left > kRows && left < 2 * kRows ? (left + 1) / 2 : std::min(kRows, left);
      const Block block{a + row * depth,
                        packed + set * groups * kLanes * kGroup,
                        start + set * kLanes,
                        out + row * columns + set * kLanes,
                        depth,
                        columns,
                        columns - set * kLanes};
      kBlocks[take - 1][sets - 1](block);
      row += take;
    }
  }
}
#endif

}  // namespace

bool has_vnni() {
#if defined(__x86_64__) && !defined(__clang__)
  return __builtin_cpu_supports("avx512bw") != 0 && __builtin_cpu_supports("avx512vnni") != 0;
#else
  return false;
#endif
}

Int8Weights::Int8Weights(const Tensor& codes, bool vnni)
    : products_(codes.size(0)), columns_(codes.size(1)), depth_(codes.size(2)) {
  if (!vnni) {
    wide_ = codes.to(at::kShort).contiguous();
    return;
  }
  const int64_t sets = (columns_ + kLanes - 1) / kLanes, groups = (depth_ + kGroup - 1) / kGroup;
  const Tensor padded = at::constant_pad_nd(codes, {0, groups * kGroup - depth_, 0, sets * kLanes - columns_});
  const Tensor packed =
      padded.view({products_, sets, kLanes, groups, kGroup}).permute({0, 1, 3, 2, 4}).contiguous().view({-1});
  packed_.assign(packed.const_data_ptr<int8_t>(), packed.const_data_ptr<int8_t>() + packed.numel());
  const Tensor start = padded.sum(-1, /*keepdim=*/false, at::kInt).mul_(-128).contiguous();
  start_.assign(start.const_data_ptr<int32_t>(), start.const_data_ptr<int32_t>() + start.numel());
}

void Int8Weights::multiply(const uint8_t* a, int64_t rows, int32_t* out) const {
  if (wide_.defined()) {
    const int64_t count = products_ * rows * depth_;
    const auto codes = std::make_unique_for_overwrite<int16_t[]>(count);
    std::transform(a, a + count, codes.get(), [](uint8_t code) { return static_cast<int16_t>(code - 128); });
    exact_products(codes.get(), wide_.const_data_ptr<int16_t>(), products_, rows, columns_, depth_, out);
    return;
  }
#if defined(__x86_64__) && !defined(__clang__)
  const int64_t sets = (columns_ + kLanes - 1) / kLanes, groups = (depth_ + kGroup - 1) / kGroup;
  for (int64_t p = 0; p < products_; ++p) {
    multiply_packed(a + p * rows * depth_, packed_.data() + p * sets * groups * kLanes * kGroup,
                    start_.data() + p * sets * kLanes, rows, columns_, depth_, out + p * rows * columns_);
  }
#endif
}

}  // namespace baseq
