#include "bfloat16_product.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#if __has_include(<ATen/native/CPUBlas.h>)
#include <ATen/native/CPUBlas.h>
#endif

#include <algorithm>
#include <utility>

#include "instruction_set.h"

// oneDNN's kernel for one block, cpublas::brgemm, existed for bfloat16 from LibTorch 2.6 on.
namespace at::native::cpublas {}

namespace baseq {
namespace {

/// Sizes of a block: what it reads stays in the second cache.
constexpr int64_t kRows = 128, kColumns = 64, kDepth = 1024;
/// Factors are filled up to a multiple of what AMX multiplies at once.
constexpr int64_t kDepthStep = 32;

/// c = a b, or c += a b. Returns whether LibTorch can.
/// @param b depth / 2 times kColumns pairs of what follows in depth
template <class Number>
bool multiply_block(int64_t rows, int64_t columns, int64_t depth, int64_t a_stride, int64_t c_stride, bool add,
                    const Number* a, const Number* b, float* c) {
  using namespace at::native::cpublas;
  if constexpr (requires { brgemm(rows, columns, depth, a_stride, kColumns, c_stride, add, a, b, c, true); }) {
    brgemm(rows, columns, depth, a_stride, kColumns, c_stride, add, a, b, c, /*is_vnni=*/true);
    return true;
  } else {
    return false;
  }
}

/// Gives back what the kernels of this thread hold of the processor (AMX).
template <class Flag>
void release(Flag is_vnni) {
  using namespace at::native::cpublas;
  if constexpr (requires { brgemm_release(is_vnni); }) brgemm_release(is_vnni);
}

/// Whether the kernel answers, and rightly: oneDNN may be limited to older instructions (ONEDNN_MAX_CPU_ISA).
bool try_block() {
  const Tensor a = at::full({1, kDepthStep}, 2, at::kBFloat16), b = at::full({kDepthStep * kColumns}, 3, at::kBFloat16);
  const Tensor c = at::zeros({1, kColumns}, at::kFloat);
  try {
    const bool done =
        multiply_block(1, kColumns, kDepthStep, kDepthStep, kColumns, false, a.const_data_ptr<at::BFloat16>(),
                       b.const_data_ptr<at::BFloat16>(), c.mutable_data_ptr<float>());
    if (done) release(true);
    return done && c.eq(6 * kDepthStep).all().item<bool>();
  } catch (const c10::Error&) {
    return false;
  }
}

/// Rows [first, first + columns) of a factor as multiply_block wants its second one.
/// @param pairs [rows, depth / 2] of two numbers each
void pack(const int32_t* pairs, int64_t first, int64_t columns, int64_t depth, int32_t* packed) {
  constexpr int64_t kLine = 16;  // of a cache
  if (columns < kColumns) std::fill_n(packed, depth * kColumns, 0);
  for (int64_t begin = 0; begin < depth; begin += kLine) {
    for (int64_t column = 0; column < columns; ++column) {
      const int32_t* from = pairs + (first + column) * depth + begin;
      for (int64_t k = 0; k < kLine; ++k) packed[(begin + k) * kColumns + column] = from[k];
    }
  }
}

int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

/// @param upper nothing is computed in blocks of rows below the diagonal
Tensor multiply(const Tensor& a, const Tensor& b, bool upper) {
  const int64_t m = a.size(0), n = b.size(0), depth = a.size(1);
  const int64_t slice = blocks_of(blocks_of(depth, blocks_of(depth, kDepth)), kDepthStep) * kDepthStep;
  Tensor c = at::empty({m, n}, at::kFloat);
  const auto* left = a.const_data_ptr<at::BFloat16>();
  const auto* right = reinterpret_cast<const int32_t*>(b.const_data_ptr<at::BFloat16>());
  auto* out = c.mutable_data_ptr<float>();
  const int64_t row_blocks = blocks_of(m, kRows);
  at::parallel_for(0, blocks_of(n, kColumns) * row_blocks, 1, [&](int64_t begin, int64_t end) {
    const Tensor packed = at::empty({depth * kColumns}, at::kBFloat16);
    auto* panel = packed.mutable_data_ptr<at::BFloat16>();
    int64_t packed_column = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i / row_blocks * kColumns, row = i % row_blocks * kRows;
      const int64_t columns = std::min(kColumns, n - column), rows = std::min(kRows, m - row);
      if (upper && row >= column + columns) continue;
      if (std::exchange(packed_column, column) != column) {
        pack(right, column, columns, depth / 2, reinterpret_cast<int32_t*>(panel));
      }
      for (int64_t k = 0; k < depth; k += slice) {
        multiply_block(rows, columns, std::min(slice, depth - k), depth, n, k > 0, left + row * depth + k,
                       static_cast<const at::BFloat16*>(panel) + k * kColumns, out + row * n + column);
      }
    }
    release(true);
  });
  return c;
}

}  // namespace

bool has_bfloat16_products() {
  static const bool there = multiplies(at::kBFloat16) && try_block();
  return there;
}

Tensor bfloat16_factor(const Tensor& matrix) {
  const int64_t depth = matrix.size(-1), filled = blocks_of(depth, kDepthStep) * kDepthStep;
  // Rounded first: LibTorch is slow in what is both a conversion and a transposition.
  const Tensor rounded = matrix.to(at::kBFloat16).reshape({-1, depth});
  return (filled == depth ? rounded : at::constant_pad_nd(rounded, {0, filled - depth})).contiguous();
}

Tensor bfloat16_product(const Tensor& a, const Tensor& b) { return multiply(a, b, /*upper=*/false); }

Tensor bfloat16_square(const Tensor& a) {
  const Tensor c = multiply(a, a, /*upper=*/true);
  for (int64_t begin = 0; begin < c.size(0); begin += kRows) {
    const int64_t end = std::min(begin + kRows, c.size(0));
    c.slice(0, end).slice(1, begin, end).copy_(c.slice(0, begin, end).slice(1, end).t());
  }
  return c;
}

}  // namespace baseq
