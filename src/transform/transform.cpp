#include "baseq/transform/transform.h"

#include <ATen/ATen.h>

#include <utility>

#include "baseq/transform/hadamard.h"

namespace baseq {
namespace {

void check_size(const char* who, const Tensor& x, int64_t size) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == size, who, ": the argument is ", x.sizes(),
              " but its last dimension must be ", size);
}

void check_square(const char* who, const Tensor& matrix, int64_t min_dim, int64_t max_dim) {
  TORCH_CHECK(at::isFloatingType(matrix.scalar_type()) && matrix.dim() >= min_dim && matrix.dim() <= max_dim &&
                  matrix.size(-1) == matrix.size(-2) && matrix.numel() > 0,
              who, ": got ", matrix.scalar_type(), " ", matrix.sizes(), " but floating-point square matrices of ",
              min_dim, " to ", max_dim, " dimensions are needed");
}

Tensor inverse_transpose(const Tensor& matrix) { return at::linalg_inv(matrix).mT(); }

/// x [.., k b] times diag(matrices), matrices [k, b, b] or [b, b] with k = 1.
Tensor times_blocks(const Tensor& x, const Tensor& matrices) {
  const Tensor m = matrices.to(x.scalar_type());
  if (m.dim() == 2) return at::matmul(x, m);
  const int64_t blocks = m.size(0);
  const int64_t width = m.size(1);
  const Tensor columns = x.reshape({-1, blocks, width}).transpose(0, 1);  // [k, rows, b]
  return at::bmm(columns, m).transpose(0, 1).reshape(x.sizes());
}

/// x [.., a b] times left (x) right.
Tensor times_kronecker(const Tensor& x, const Tensor& left, const Tensor& right) {
  const Tensor grid = x.reshape({-1, left.size(0), right.size(0)});
  const Tensor fast = at::matmul(grid, right.to(x.scalar_type()));
  return at::matmul(left.to(x.scalar_type()).t(), fast).reshape(x.sizes());
}

}  // namespace

Tensor cayley(const Tensor& parameter) {
  TORCH_CHECK(
      at::isFloatingType(parameter.scalar_type()) && parameter.dim() >= 2 && parameter.size(-1) == parameter.size(-2),
      "cayley: the parameter is ", parameter.scalar_type(), " ", parameter.sizes(),
      " but floating-point square matrices are needed");
  const Tensor skew = parameter - parameter.mT();
  const Tensor identity = at::eye(parameter.size(-1), parameter.options().requires_grad(false));
  return at::linalg_solve(identity + skew, identity - skew);
}

ScaleTransform::ScaleTransform(Tensor scale) : scale_(std::move(scale)) {
  TORCH_CHECK(scale_.dim() == 1 && at::isFloatingType(scale_.scalar_type()), "ScaleTransform: the scale is ",
              scale_.scalar_type(), " ", scale_.sizes(), " but a floating-point vector is needed");
}

int64_t ScaleTransform::size() const { return scale_.size(0); }

Tensor ScaleTransform::apply(const Tensor& x) const {
  check_size("ScaleTransform", x, size());
  return x * scale_.to(x.scalar_type());
}

Tensor ScaleTransform::apply_inverse_transpose(const Tensor& w) const {
  check_size("ScaleTransform", w, size());
  return w / scale_.to(w.scalar_type());
}

HadamardTransform::HadamardTransform(int64_t size) : size_(size) {
  TORCH_CHECK(size >= 1, "HadamardTransform: the size is ", size, " but must be at least 1");
}

Tensor HadamardTransform::apply(const Tensor& x) const {
  check_size("HadamardTransform", x, size_);
  return hadamard_transform(x);
}

// T^-T = T for every orthogonal T.
Tensor HadamardTransform::apply_inverse_transpose(const Tensor& w) const { return apply(w); }

OrthogonalTransform::OrthogonalTransform(Tensor parameter) : parameter_(std::move(parameter)) {
  check_square("OrthogonalTransform", parameter_, 2, 3);
}

int64_t OrthogonalTransform::size() const { return parameter_.numel() / parameter_.size(-1); }

Tensor OrthogonalTransform::apply(const Tensor& x) const {
  check_size("OrthogonalTransform", x, size());
  return times_blocks(x, cayley(parameter_));
}

Tensor OrthogonalTransform::apply_inverse_transpose(const Tensor& w) const { return apply(w); }

KroneckerTransform::KroneckerTransform(Tensor left, Tensor right) : left_(std::move(left)), right_(std::move(right)) {
  check_square("KroneckerTransform", left_, 2, 2);
  check_square("KroneckerTransform", right_, 2, 2);
}

int64_t KroneckerTransform::size() const { return left_.size(0) * right_.size(0); }

Tensor KroneckerTransform::apply(const Tensor& x) const {
  check_size("KroneckerTransform", x, size());
  return times_kronecker(x, left_, right_);
}

Tensor KroneckerTransform::apply_inverse_transpose(const Tensor& w) const {
  check_size("KroneckerTransform", w, size());
  return times_kronecker(w, inverse_transpose(left_), inverse_transpose(right_));
}

BlockDiagonalTransform::BlockDiagonalTransform(Tensor matrices) : matrices_(std::move(matrices)) {
  check_square("BlockDiagonalTransform", matrices_, 3, 3);
}

int64_t BlockDiagonalTransform::size() const { return matrices_.size(0) * matrices_.size(1); }

Tensor BlockDiagonalTransform::apply(const Tensor& x) const {
  check_size("BlockDiagonalTransform", x, size());
  return times_blocks(x, matrices_);
}

Tensor BlockDiagonalTransform::apply_inverse_transpose(const Tensor& w) const {
  check_size("BlockDiagonalTransform", w, size());
  return times_blocks(w, inverse_transpose(matrices_));
}

PermutationTransform::PermutationTransform(Tensor permutation) : permutation_(std::move(permutation)) {
  TORCH_CHECK(permutation_.dim() == 1 && permutation_.scalar_type() == at::kLong &&
                  at::equal(std::get<0>(permutation_.sort()), at::arange(permutation_.size(0), permutation_.options())),
              "PermutationTransform: got ", permutation_.scalar_type(), " ", permutation_.sizes(),
              " but an int64 vector with each of 0 .. n-1 once is needed");
}

int64_t PermutationTransform::size() const { return permutation_.size(0); }

Tensor PermutationTransform::apply(const Tensor& x) const {
  check_size("PermutationTransform", x, size());
  return x.index_select(-1, permutation_);
}

Tensor PermutationTransform::apply_inverse_transpose(const Tensor& w) const { return apply(w); }

ComposedTransform::ComposedTransform(std::vector<std::shared_ptr<const Transform>> transforms)
    : transforms_(std::move(transforms)) {
  TORCH_CHECK(!transforms_.empty(), "ComposedTransform: got no transform but at least one is needed");
  for (const auto& transform : transforms_) {
    TORCH_CHECK(transform && transform->size() == transforms_.front()->size(),
                "ComposedTransform: one transform has size ", transform ? transform->size() : 0, " but the first has ",
                transforms_.front()->size());
  }
}

int64_t ComposedTransform::size() const { return transforms_.front()->size(); }

Tensor ComposedTransform::apply(const Tensor& x) const {
  Tensor y = x;
  for (const auto& transform : transforms_) y = transform->apply(y);
  return y;
}

// (T_1 T_2)^-T = T_1^-T T_2^-T: the order is the same.
Tensor ComposedTransform::apply_inverse_transpose(const Tensor& w) const {
  Tensor y = w;
  for (const auto& transform : transforms_) y = transform->apply_inverse_transpose(y);
  return y;
}

std::vector<Tensor> ComposedTransform::parameters() const {
  std::vector<Tensor> all;
  for (const auto& transform : transforms_) {
    for (const Tensor& parameter : transform->parameters()) all.push_back(parameter);
  }
  return all;
}

}  // namespace baseq
