#include "baseq/quant/low_rank.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <vector>

#include "baseq/quant/gptq.h"
#include "finite.h"
#include "product.h"

namespace baseq {
namespace {

/// Up to this size of the smaller side all eigenvectors are computed.
constexpr int64_t kDenseLimit = 1024;
/// Columns of a Krylov block beyond the rank.
constexpr int64_t kOversampling = 8;
constexpr int64_t kMaxBlocks = 32;
constexpr double kTolerance = 1e-5;

/// x R, x: [..., in_features].
Tensor times_moments(const Tensor& x, const Tensor& moments) {
  if (!moments.defined()) return x;
  return moments.dim() == 1 ? x * moments : at::mm(x, moments);
}

struct Eigenvectors {
  Tensor vectors;  ///< [n, count]
  double sum = 0;  ///< of the eigenvalues
};

/// Of a symmetric matrix, those with the largest eigenvalues.
Eigenvectors largest_eigenvectors(const Tensor& matrix, int64_t count) {
  const auto [values, vectors] = at::linalg_eigh((matrix + matrix.t()) / 2);
  const int64_t n = matrix.size(0);
  return {vectors.narrow(1, n - count, count).flip(1), values.narrow(0, n - count, count).sum().item<double>()};
}

/// Of E R E^T, by Rayleigh-Ritz in the span of X, G X, G^2 X, ... with G = E R E^T and a random X (arXiv 1504.05477).
Eigenvectors krylov_eigenvectors(const Tensor& error, const Tensor& moments, int64_t count) {
  const int64_t n = error.size(0);
  const auto generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t{0});
  Tensor block = at::randn({n, std::min(n, count + kOversampling)}, generator, at::kDouble).to(error.options());
  Tensor basis = at::empty({n, 0}, error.options()), images = basis;
  Eigenvectors result;
  for (int64_t step = 0; step < kMaxBlocks && basis.size(1) + block.size(1) <= n; ++step) {
    // Twice: once leaves what cancels.
    for (int pass = 0; pass < 2; ++pass) {
      block = std::get<0>(at::linalg_qr(block - at::mm(basis, at::mm(basis.t(), block))));
    }
    const Tensor image = at::mm(error, times_moments(at::mm(block.t(), error), moments).t());
    basis = at::cat({basis, block}, 1);
    images = at::cat({images, image}, 1);
    const Eigenvectors ritz = largest_eigenvectors(at::mm(basis.t(), images), count);
    const double before = result.sum;
    result = {at::mm(basis, ritz.vectors), ritz.sum};
    if (result.sum - before <= kTolerance * result.sum) break;
    block = image;
  }
  return result;
}

}  // namespace

LowRankCorrection reconstruct_error(const Tensor& error, const Tensor& moments, int64_t rank) {
  TORCH_CHECK(error.dim() == 2 && error.is_floating_point(), "reconstruct_error: error is ", error.scalar_type(),
              " of size ", error.sizes(), ", expected a floating type and [out_features, in_features]");
  const int64_t rows = error.size(0), columns = error.size(1);
  TORCH_CHECK(rank > 0, "reconstruct_error: rank is ", rank, ", expected a positive number");
  TORCH_CHECK(!moments.defined() || moments.sizes() == at::IntArrayRef({columns}) ||
                  moments.sizes() == at::IntArrayRef({columns, columns}),
              "reconstruct_error: moments are ", moments.sizes(), " but the error is ", error.sizes());
  const at::NoGradGuard no_grad;
  const Tensor e = error.to(at::kDouble);
  const Tensor r = moments.defined() ? moments.to(e.options()) : Tensor();
  TORCH_CHECK(all_finite(e) && (!r.defined() || all_finite(r)),
              "reconstruct_error: the error or the moments have a value that is not finite");
  rank = std::min({rank, rows, columns});
  Eigenvectors found;
  if (std::min(rows, columns) > std::max(kDenseLimit, 8 * rank)) {
    found = krylov_eigenvectors(e, r, rank);
  } else if (rows <= columns) {
    found = largest_eigenvectors(at::mm(times_moments(e, r), e.t()), rank);
  } else {
    // E = Q T with a square T: E R E^T = Q (T R T^T) Q^T.
    const auto [q, t] = at::linalg_qr(e);
    found = largest_eigenvectors(at::mm(times_moments(t, r), t.t()), rank);
    found.vectors = at::mm(q, found.vectors);
  }
  return {.A = at::mm(found.vectors.t(), e), .B = found.vectors, .removed = found.sum};
}

Tensor LowRankFactors::dequantized_A() const {
  return A_scale.defined() ? A.to(at::kFloat) * A_scale : A.to(at::kFloat);
}

Tensor LowRankFactors::dequantized_B() const {
  return B_scale.defined() ? B.to(at::kFloat) * B_scale : B.to(at::kFloat);
}

Tensor LowRankFactors::product() const { return matrix_product(dequantized_B(), dequantized_A()); }

LowRankFactors store_factors(const Tensor& A, const Tensor& B, at::ScalarType dtype) {
  if (dtype != at::kChar) return {.A = A.to(dtype), .B = B.to(dtype)};
  // What was stored stays itself when it is stored again: the largest value gets code 127 and not 127.5, and a product
  // of a code and a scale is exact.
  const QuantSpec spec{.num_bits = 8, .scale_dtype = at::kBFloat16};
  const Tensor clip = at::scalar_tensor(127.5 / 127, A.options().dtype(at::kFloat)), b = B.t();
  const QParams of_a = compute_qparams(A, spec, clip), of_b = compute_qparams(b, spec, clip);
  return {.A = quantize(A, of_a, spec),
          .B = quantize(b, of_b, spec).t().contiguous(),
          .A_scale = of_a.scale,
          .B_scale = of_b.scale.t()};
}

}  // namespace baseq
