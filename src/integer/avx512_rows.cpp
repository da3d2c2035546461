#if defined(__x86_64__) && !defined(__clang__)

#include "attention_rows.h"
#include "row_functions.h"
#include "row_kernels.h"

namespace baseq {

__attribute__((target("avx512f,avx512bw,avx512vnni,fma"))) void Avx512Rows::attend(const AttentionRows& task,
                                                                                   void* scratch) {
  attend_rows<Avx512Registers>(task, scratch);
}

__attribute__((target("avx512f,avx512bw,avx512vnni,fma"))) void Avx512Rows::rms_norm(const float* x,
                                                                                     const float* weight, float eps,
                                                                                     int64_t n, float* y) {
  rms_norm_row<Avx512Registers>(x, weight, eps, n, y);
}

__attribute__((target("avx512f,avx512bw,avx512vnni,fma"))) void Avx512Rows::silu_product(const float* gate,
                                                                                         const float* up,
                                                                                         const float* factor, int64_t n,
                                                                                         float* y) {
  silu_product_row<Avx512Registers>(gate, up, factor, n, y);
}

__attribute__((target("avx512f,avx512bw,avx512vnni,fma"))) void Avx512Rows::rope(float* x, const float* cos,
                                                                                 const float* sin, int64_t half) {
  rope_head<Avx512Registers>(x, cos, sin, half);
}

}  // namespace baseq

#endif
