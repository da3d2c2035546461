#pragma once

#include <cstdint>

/// Integer matrix products of the exact path.
namespace baseq {

/// out[p] = a[p] b[p]^T for each of `products` matrices a [rows, depth] and b [columns, depth]. Sums of int32 wrap
/// around modulo 2^32, which is harmless when the value that they are parts of fits.
void exact_products(const int16_t* a, const int16_t* b, int64_t products, int64_t rows, int64_t columns, int64_t depth,
                    int32_t* out);
/// The same with sums of int64, for `depth` of any size.
void exact_products(const int16_t* a, const int16_t* b, int64_t products, int64_t rows, int64_t columns, int64_t depth,
                    int64_t* out);

}  // namespace baseq
