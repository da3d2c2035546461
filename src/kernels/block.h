#pragma once

#include <array>
#include <cmath>
#include <cstdint>

/// Kernels are written once, as templates over the block of threads that runs them: on a GPU a block of CUDA threads,
/// on the host one thread that takes the part of each in turn. Between two calls of each() all threads have reached the
/// same place, so that a kernel computes the same bits on both, and tests compare it with the CPU's own kernels where
/// there is no GPU.
///
/// A kernel keeps nothing in local variables from one each() to the next but what is the same for all threads. What
/// each thread has of its own is a PerThread, what they share is memory that the caller gives.

#ifdef __CUDACC__
#define BASEQ_KERNEL __host__ __device__ inline
#else
#define BASEQ_KERNEL inline
#endif

namespace baseq::kernels {

/// a * b + c, rounded once.
BASEQ_KERNEL float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

/// To the nearest integer, halves to even.
BASEQ_KERNEL float rounded(float x) { return std::nearbyint(x); }

/// kThreads threads on the host, in lock-step.
template <int kCount>
struct HostBlock {
  static constexpr int kThreads = kCount;
  template <class T>
  using PerThread = std::array<T, kCount>;

  template <class Work>
  void each(const Work& work) const {
    for (int thread = 0; thread < kThreads; ++thread) work(thread);
  }
};

#ifdef __CUDACC__
/// The CUDA block that the calling thread is one of.
template <int kCount>
struct CudaBlock {
  static constexpr int kThreads = kCount;
  template <class T>
  struct PerThread {
    T value;
    __device__ T& operator[](int) { return value; }
  };

  template <class Work>
  __device__ void each(const Work& work) const {
    work(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
};
#endif

}  // namespace baseq::kernels
