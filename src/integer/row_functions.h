#pragma once

#include "attention_kernels.h"

/// The functions beside the products for each width of registers: what IntegerKernels says of them.
namespace baseq {

struct Avx512Rows {
  static void attend(const AttentionRows& task, void* scratch);
  static void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y);
  static void silu_product(const float* gate, const float* up, const float* factor, int64_t n, float* y);
  static void rope(float* x, const float* cos, const float* sin, int64_t half);
};
struct Avx2Rows {
  static void attend(const AttentionRows& task, void* scratch);
  static void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y);
  static void silu_product(const float* gate, const float* up, const float* factor, int64_t n, float* y);
  static void rope(float* x, const float* cos, const float* sin, int64_t half);
};
struct PortableRows {
  static void attend(const AttentionRows& task, void* scratch);
  static void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y);
  static void silu_product(const float* gate, const float* up, const float* factor, int64_t n, float* y);
  static void rope(float* x, const float* cos, const float* sin, int64_t half);
};

}  // namespace baseq
