#include "int8_product.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "exact_product.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace baseq {
namespace {

constexpr int64_t kLanes = 16;  // columns of a register
constexpr int64_t kGroup = 4;   // codes of a column that one instruction takes
// Sixteen sums stay in registers; g++ moves those of larger blocks to memory.
constexpr int64_t kRows = 4, kSets = 4;

#if defined(__x86_64__)
/// One product of packed weights: `sets` registers of columns.
struct Block {
  const uint8_t* a;
  const int8_t* packed;
  const int32_t* start;
  int32_t* out;
  int64_t depth, columns, stored;  ///< `stored` of the columns from `out` on exist
};

template <int64_t kBlockRows, int64_t kBlockSets>
__attribute__((target("avx512f,avx512vnni"))) void multiply_block(const Block& block) {
  const int64_t groups = (block.depth + kGroup - 1) / kGroup;
  __m512i sums[kBlockRows][kBlockSets];
  for (int64_t s = 0; s < kBlockSets; ++s) {
    const __m512i first = _mm512_loadu_si512(block.start + s * kLanes);
    for (int64_t r = 0; r < kBlockRows; ++r) sums[r][s] = first;
  }
  for (int64_t g = 0; g < groups; ++g) {
    __m512i weights[kBlockSets];
    for (int64_t s = 0; s < kBlockSets; ++s) {
      weights[s] = _mm512_loadu_si512(block.packed + (s * groups + g) * kLanes * kGroup);
    }
    for (int64_t r = 0; r < kBlockRows; ++r) {
      int32_t four;
      std::memcpy(&four, block.a + r * block.depth + g * kGroup, sizeof(four));
      const __m512i codes = _mm512_set1_epi32(four);
      for (int64_t s = 0; s < kBlockSets; ++s) sums[r][s] = _mm512_dpbusd_epi32(sums[r][s], codes, weights[s]);
    }
  }
  if (block.stored >= kBlockSets * kLanes) {
    for (int64_t r = 0; r < kBlockRows; ++r) {
      for (int64_t s = 0; s < kBlockSets; ++s) {
        _mm512_storeu_si512(block.out + r * block.columns + s * kLanes, sums[r][s]);
      }
    }
    return;
  }
  for (int64_t s = 0; s < kBlockSets; ++s) {
    const int64_t rest = block.stored - s * kLanes;
    const auto mask = static_cast<__mmask16>(rest >= kLanes ? 0xffff : (1 << rest) - 1);
    for (int64_t r = 0; r < kBlockRows; ++r) {
      _mm512_mask_storeu_epi32(block.out + r * block.columns + s * kLanes, mask, sums[r][s]);
    }
  }
}

using MultiplyBlock = void (*)(const Block&);
template <int64_t kBlockRows>
constexpr MultiplyBlock kOfRows[] = {multiply_block<kBlockRows, 1>, multiply_block<kBlockRows, 2>,
                                     multiply_block<kBlockRows, 3>, multiply_block<kBlockRows, 4>};
constexpr const MultiplyBlock* kBlocks[kRows] = {kOfRows<1>, kOfRows<2>, kOfRows<3>, kOfRows<4>};

void multiply_packed(const uint8_t* a, const int8_t* packed, const int32_t* start, int64_t rows, int64_t columns,
                     int64_t depth, int32_t* out) {
  const int64_t groups = (depth + kGroup - 1) / kGroup, all_sets = (columns + kLanes - 1) / kLanes;
  for (int64_t set = 0; set < all_sets; set += kSets) {
    const int64_t sets = std::min(kSets, all_sets - set);
    for (int64_t row = 0; row < rows;) {
      // The last rows are shared out evenly: 6 are 3 and 3, not 4 and 2.
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
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512vnni") != 0;
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
#if defined(__x86_64__)
  const int64_t sets = (columns_ + kLanes - 1) / kLanes, groups = (depth_ + kGroup - 1) / kGroup;
  for (int64_t p = 0; p < products_; ++p) {
    multiply_packed(a + p * rows * depth_, packed_.data() + p * sets * groups * kLanes * kGroup,
                    start_.data() + p * sets * kLanes, rows, columns_, depth_, out + p * rows * columns_);
  }
#endif
}

}  // namespace baseq
