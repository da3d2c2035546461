#pragma once

#include <cuda_runtime_api.h>

#include "fake_quantize.h"
#include "gptq.h"
#include "hadamard.h"

/// Launches of the kernels on a stream; all pointers are to device memory. Each returns what the launch said.
namespace baseq::kernels {

/// A tensor [rows, groups, size] on its way through a quant point. Null: no clip, gain or shift.
struct PointTensors {
  const float* x;
  const float *clip, *gain, *shift;  ///< [groups], [groups * size], [groups * size]
  int64_t rows, groups, size;
};

cudaError_t launch_fake_quantize(const PointTensors& point, const RangeRule& rule, bool add_shift_back, float* out,
                                 cudaStream_t stream);

/// Rows are taken in `chunks` pieces, each by one block of threads, so that the sums over rows are always added in the
/// same order; the pieces are left to be added.
struct PointGradients {
  float* x;             ///< [rows, groups, size], written
  float *gain, *shift;  ///< [chunks, groups * size], zeros before; null: not asked for
  double* clip;         ///< [chunks, groups], zeros before; null: not asked for
  int64_t chunks;
};
cudaError_t launch_fake_quantize_backward(const PointTensors& point, const float* out_grad, const RangeRule& rule,
                                          bool add_shift_back, const PointGradients& gradients, cudaStream_t stream);

/// y = x H * scale for x and y [rows, plan.size]; the codes of the factors are in device memory.
cudaError_t launch_hadamard(const HadamardPlan& plan, const float* x, float* y, int64_t rows, cudaStream_t stream);

/// Rounds the columns of `rows` rows, a multiple of kRowsPerBlock.
inline constexpr int kRowsPerBlock = 64;
/// @param losses [rows]
cudaError_t launch_round_columns(const GptqColumns& columns, int64_t rows, float* losses, cudaStream_t stream);

}  // namespace baseq::kernels
