#include "cuda_kernels.h"

namespace baseq::kernels {
namespace {

constexpr int kPointThreads = 256, kHadamardThreads = 512;

__device__ Group group_of(const PointTensors& point, int64_t row, int64_t group) {
  return {point.x + (row * point.groups + group) * point.size,
          point.gain == nullptr ? nullptr : point.gain + group * point.size,
          point.shift == nullptr ? nullptr : point.shift + group * point.size,
          point.clip == nullptr ? 1.0F : point.clip[group], point.size};
}

__global__ void __launch_bounds__(kPointThreads)
    fake_quantize_kernel(PointTensors point, RangeRule rule, bool add_shift_back, float* out) {
  __shared__ Extreme shared[kPointThreads];
  const CudaBlock<kPointThreads> block;
  for (int64_t at = blockIdx.x; at < point.rows * point.groups; at += gridDim.x) {
    const int64_t row = at / point.groups, group = at % point.groups;
    fake_quantize_group(block, group_of(point, row, group), rule, add_shift_back, out + at * point.size, shared);
  }
}

__global__ void __launch_bounds__(kPointThreads)
    fake_quantize_backward_kernel(PointTensors point, const float* out_grad, RangeRule rule, bool add_shift_back,
                                  PointGradients gradients) {
  extern __shared__ float sums[];
  __shared__ Extreme shared[kPointThreads];
  __shared__ float tails[2 * kLanes];
  const CudaBlock<kPointThreads> block;
  const int64_t chains = num_chains(point.size), features = point.groups * point.size;
  const ChainSums chain_sums{sums, sums + chains, tails, tails + kLanes};
  // A block takes one group of one piece of the rows, row after row.
  const int64_t chunk = blockIdx.x / point.groups, group = blockIdx.x % point.groups;
  const int64_t end = point.rows * (chunk + 1) / gradients.chunks;
  for (int64_t row = point.rows * chunk / gradients.chunks; row < end; ++row) {
    const int64_t at = (row * point.groups + group) * point.size, sum = chunk * features + group * point.size;
    const GroupGradients of_group{gradients.x + at, gradients.gain == nullptr ? nullptr : gradients.gain + sum,
                                  gradients.shift == nullptr ? nullptr : gradients.shift + sum,
                                  gradients.clip == nullptr ? nullptr : gradients.clip + chunk * point.groups + group};
    fake_quantize_group_backward(block, group_of(point, row, group), out_grad + at, rule, add_shift_back, of_group,
                                 shared, chain_sums);
  }
}

__global__ void __launch_bounds__(kHadamardThreads) hadamard_kernel(HadamardPlan plan, const float* x, float* y) {
  extern __shared__ float shared[];
  const CudaBlock<kHadamardThreads> block;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * plan.size;
  block.each([&](int thread) {
    for (int i = thread; i < plan.size; i += kHadamardThreads) shared[i] = x[begin + i];
  });
  hadamard_row(block, plan, shared, shared + plan.size);
  block.each([&](int thread) {
    for (int i = thread; i < plan.size; i += kHadamardThreads) y[begin + i] = shared[i];
  });
}

__global__ void __launch_bounds__(kRowsPerBlock) round_columns_kernel(GptqColumns columns, float* losses) {
  extern __shared__ float shared[];
  const CudaBlock<kRowsPerBlock> block;
  const int64_t top = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock;
  columns.target += top;
  columns.corrected += top;
  columns.scale += top;
  if (columns.zero_point != nullptr) columns.zero_point += top;
  columns.codes += top;
  CudaBlock<kRowsPerBlock>::PerThread<float> loss;
  round_columns(block, columns, shared, shared + columns.width * kRowsPerBlock, loss);
  losses[top + threadIdx.x] = loss[0];
}

/// More than 48 KiB of shared memory have to be asked for.
template <class Kernel>
cudaError_t allow(Kernel* kernel, size_t bytes) {
  if (bytes <= (size_t{48} << 10)) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

}  // namespace

cudaError_t launch_fake_quantize(const PointTensors& point, const RangeRule& rule, bool add_shift_back, float* out,
                                 cudaStream_t stream) {
  constexpr int64_t kMostBlocks = int64_t{1} << 30;
  const int64_t groups = point.rows * point.groups;
  if (groups == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(groups < kMostBlocks ? groups : kMostBlocks);
  fake_quantize_kernel<<<blocks, kPointThreads, 0, stream>>>(point, rule, add_shift_back, out);
  return cudaGetLastError();
}

cudaError_t launch_fake_quantize_backward(const PointTensors& point, const float* out_grad, const RangeRule& rule,
                                          bool add_shift_back, const PointGradients& gradients, cudaStream_t stream) {
  if (point.rows == 0) return cudaSuccess;
  const size_t bytes = static_cast<size_t>(2 * num_chains(point.size)) * sizeof(float);
  const cudaError_t allowed = allow(fake_quantize_backward_kernel, bytes);
  if (allowed != cudaSuccess) return allowed;
  fake_quantize_backward_kernel<<<static_cast<unsigned>(gradients.chunks * point.groups), kPointThreads, bytes,
                                  stream>>>(point, out_grad, rule, add_shift_back, gradients);
  return cudaGetLastError();
}

cudaError_t launch_hadamard(const HadamardPlan& plan, const float* x, float* y, int64_t rows, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  // Only dense factors need the second half.
  const size_t bytes = static_cast<size_t>(plan.size) * sizeof(float) * (plan.num_factors > 0 ? 2 : 1);
  const cudaError_t allowed = allow(hadamard_kernel, bytes);
  if (allowed != cudaSuccess) return allowed;
  hadamard_kernel<<<static_cast<unsigned>(rows), kHadamardThreads, bytes, stream>>>(plan, x, y);
  return cudaGetLastError();
}

cudaError_t launch_round_columns(const GptqColumns& columns, int64_t rows, float* losses, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  const size_t bytes = static_cast<size_t>(columns.width * (kRowsPerBlock + 1)) * sizeof(float);
  const cudaError_t allowed = allow(round_columns_kernel, bytes);
  if (allowed != cudaSuccess) return allowed;
  round_columns_kernel<<<static_cast<unsigned>(rows / kRowsPerBlock), kRowsPerBlock, bytes, stream>>>(columns, losses);
  return cudaGetLastError();
}

}  // namespace baseq::kernels
