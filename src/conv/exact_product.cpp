#include "exact_product.h"

#include <ATen/Parallel.h>

namespace baseq {
namespace {

/// Unsigned sums wrap around by definition.
template <class Sum>
[[gnu::always_inline]] inline Sum dot(const int16_t* a, const int16_t* b, int64_t depth) {
  Sum sum = 0;
  for (int64_t k = 0; k < depth; ++k) sum += static_cast<Sum>(int32_t{a[k]} * int32_t{b[k]});
  return sum;
}

__attribute__((target_clones("avx2", "default"))) void row_of_products(const int16_t* a, const int16_t* b,
                                                                       int64_t columns, int64_t depth, int32_t* out) {
  for (int64_t j = 0; j < columns; ++j) out[j] = static_cast<int32_t>(dot<uint32_t>(a, b + j * depth, depth));
}
__attribute__((target_clones("avx2", "default"))) void row_of_products(const int16_t* a, const int16_t* b,
                                                                       int64_t columns, int64_t depth, int64_t* out) {
  for (int64_t j = 0; j < columns; ++j) out[j] = static_cast<int64_t>(dot<uint64_t>(a, b + j * depth, depth));
}

template <class Out>
void all_products(const int16_t* a, const int16_t* b, int64_t products, int64_t rows, int64_t columns, int64_t depth,
                  Out* out) {
  at::parallel_for(0, products * rows, 1 + 65536 / (columns * depth), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      row_of_products(a + i * depth, b + i / rows * columns * depth, columns, depth, out + i * columns);
    }
  });
}

}  // namespace

void exact_products(const int16_t* a, const int16_t* b, int64_t products, int64_t rows, int64_t columns, int64_t depth,
                    int32_t* out) {
  all_products(a, b, products, rows, columns, depth, out);
}

void exact_products(const int16_t* a, const int16_t* b, int64_t products, int64_t rows, int64_t columns, int64_t depth,
                    int64_t* out) {
  all_products(a, b, products, rows, columns, depth, out);
}

}  // namespace baseq
