#include "attention_rows.h"
#include "row_functions.h"
#include "row_kernels.h"

namespace baseq {

void PortableRows::attend(const AttentionRows& task, void* scratch) { attend_rows<PortableRegisters>(task, scratch); }

void PortableRows::rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y) {
  rms_norm_row<PortableRegisters>(x, weight, eps, n, y);
}

void PortableRows::silu_product(const float* gate, const float* up, const float* factor, int64_t n, float* y) {
  silu_product_row<PortableRegisters>(gate, up, factor, n, y);
}

void PortableRows::rope(float* x, const float* cos, const float* sin, int64_t half) {
  rope_head<PortableRegisters>(x, cos, sin, half);
}

}  // namespace baseq
