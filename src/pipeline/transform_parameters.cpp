#include "transform_parameters.h"

#include <ATen/ATen.h>

#include <memory>
#include <optional>
#include <utility>

#include "cayley_sgd.h"

namespace baseq {
namespace {

/// Share of the magnitude on the diagonal that those beside it may have together.
constexpr double kDominance = 0.99;

/// Where a factor that is learned multiplies activations, and leaves the rows of writers as they are.
bool acts_on_activations(Site site, Factor::Kind kind) { return site == Site::kDown && kind == Factor::Kind::kScale; }

/// Linears whose rows or columns a factor at a site changes while it is learned.
std::vector<std::string> linears_around(Site site, Factor::Kind kind) {
  const SiteInfo& info = site_info(site);
  std::vector<std::string> names(info.readers.begin(), info.readers.end());
  // What runs online leaves the writers alone: all of it but scales, and the matrices at value.
  const bool writers = site == Site::kValue || (kind == Factor::Kind::kScale && !acts_on_activations(site, kind));
  if (writers) names.insert(names.end(), info.writers.begin(), info.writers.end());
  return names;
}

Parameter moving(Site site, Factor::Kind kind, std::vector<Tensor> leaves, std::function<void(Factor&)> write) {
  return {
      .leaves = std::move(leaves),
      .write = [site, kind, write = std::move(write)](BlockState& state) { write(*find_factor(state, site, kind)); },
      .reaches = linears_around(site, kind),
      .moves = true,
      .on_activations = acts_on_activations(site, kind)};
}

Parameter scale_leaf(Site site, const Factor& factor) {
  const Tensor logarithm = new_leaf(factor.left.log());
  return moving(site, Factor::Kind::kScale, {logarithm}, [logarithm](Factor& scale) {
    scale.left = logarithm.exp();
    scale.left_inverse = (-logarithm).exp();
  });
}

Parameter rotation_leaf(Site site, const Factor& factor) {
  const Tensor turn = new_leaf(at::zeros_like(factor.left));
  return moving(site, Factor::Kind::kMatrix, {turn}, [turn, start = factor.detach()](Factor& matrix) {
    const Tensor rotation = cayley(turn);
    matrix.left = at::matmul(rotation, start.left);
    if (!start.orthogonal()) matrix.left_inverse = at::matmul(start.left_inverse, rotation.mT());
  });
}

/// U C(a) diag(v) C(b) V with the Cayley map C; at first the matrices [.., n, n] that it is made of.
class SvdForm {
 public:
  SvdForm(const Tensor& matrices, bool orthogonal) {
    const Tensor identity = at::eye(matrices.size(-1), matrices.options()).expand_as(matrices);
    if (orthogonal) {
      left_ = matrices.detach();
      right_ = identity;
      logarithm_ = new_leaf(at::zeros_like(matrices.select(-1, 0)));
    } else {
      const auto [u, v, vh] = at::linalg_svd(matrices.detach().to(at::kDouble), /*full_matrices=*/true);
      left_ = u.to(matrices.scalar_type());
      right_ = vh.to(matrices.scalar_type());
      logarithm_ = new_leaf(v.log().to(matrices.scalar_type()));
    }
    left_turn_ = new_leaf(at::zeros_like(matrices));
    right_turn_ = new_leaf(at::zeros_like(matrices));
  }

  std::vector<Tensor> leaves() const { return {left_turn_, logarithm_, right_turn_}; }
  void write(Tensor& matrices, Tensor& inverses) const {
    const Tensor u = at::matmul(left_, cayley(left_turn_)), vh = at::matmul(cayley(right_turn_), right_);
    matrices = at::matmul(u * logarithm_.exp().unsqueeze(-2), vh);
    inverses = at::matmul(vh.mT() * (-logarithm_).exp().unsqueeze(-2), u.mT());
  }

 private:
  Tensor left_, right_, left_turn_, right_turn_, logarithm_;
};

Parameter svd_leaf(Site site, const Factor& factor) {
  const SvdForm form(factor.left, factor.orthogonal());
  return moving(site, Factor::Kind::kMatrix, form.leaves(),
                [form](Factor& matrix) { form.write(matrix.left, matrix.left_inverse); });
}

Parameter kronecker_leaf(Site site, const Factor& factor) {
  const SvdForm left(factor.left, !factor.left_inverse.defined());
  std::optional<SvdForm> right;
  std::vector<Tensor> leaves = left.leaves();
  if (factor.right.defined()) {
    right.emplace(factor.right, !factor.right_inverse.defined());
    for (const Tensor& leaf : right->leaves()) leaves.push_back(leaf);
  }
  return moving(site, Factor::Kind::kKronecker, std::move(leaves), [left, right](Factor& kronecker) {
    left.write(kronecker.left, kronecker.left_inverse);
    if (right) right->write(kronecker.right, kronecker.right_inverse);
  });
}

Parameter band_leaf(Site site, const Factor& factor) {
  const Tensor start = factor.left.detach(), identity = at::eye(start.size(-1), start.options());
  TORCH_CHECK(at::allclose(diagonally_dominant(start), start, /*rtol=*/0, /*atol=*/0), "learn: the matrix at ",
              std::string(site_info(site).name), " is not strictly diagonally dominant, as \"band\" needs it at first");
  const Tensor moved = new_leaf(at::zeros_like(start));
  const auto mask = std::make_shared<Tensor>();
  Parameter parameter = moving(site, Factor::Kind::kMatrix, {moved}, [=](Factor& matrix) {
    matrix.left = diagonally_dominant(start + moved * *mask);
    matrix.left_inverse = at::linalg_solve(matrix.left, identity.expand_as(matrix.left));
  });
  parameter.begin_epoch = [mask, size = start.size(-1), options = start.options()](int64_t epoch, int64_t num_epochs) {
    *mask = band_mask(size, epoch, num_epochs).to(options);
  };
  parameter.begin_epoch(0, 1);
  return parameter;
}

constexpr TransformLeaf kLeaves[] = {{"scale", Factor::Kind::kScale, scale_leaf},
                                     {"matrix", Factor::Kind::kMatrix, rotation_leaf},
                                     {"svd", Factor::Kind::kMatrix, svd_leaf},
                                     {"band", Factor::Kind::kMatrix, band_leaf},
                                     {"kronecker", Factor::Kind::kKronecker, kronecker_leaf}};

}  // namespace

std::span<const TransformLeaf> transform_leaves() { return kLeaves; }

Parameter orthogonal_leaf(Site site, const Factor& factor) {
  TORCH_CHECK(factor.orthogonal(), "learn step: the rule \"cayley\" needs an orthogonal matrix at ",
              std::string(site_info(site).name));
  const Tensor leaf = new_leaf(factor.left);
  Parameter parameter = moving(site, Factor::Kind::kMatrix, {leaf}, [leaf](Factor& matrix) { matrix.left = leaf; });
  parameter.orthogonal = true;
  parameter.project = [leaf] { leaf.copy_(nearest_orthogonal(leaf)); };
  return parameter;
}

Tensor band_mask(int64_t n, int64_t epoch, int64_t num_epochs) {
  const int64_t width = num_epochs > 1 ? (n - 1) * epoch / (num_epochs - 1) + 1 : n;
  const Tensor place = at::arange(n);
  return (place.unsqueeze(0) - place.unsqueeze(1)).abs().le(width);
}

Tensor diagonally_dominant(const Tensor& matrices) {
  const Tensor diagonal = matrices.diagonal(0, -2, -1);
  const Tensor rest = matrices - at::diag_embed(diagonal);
  const Tensor sums = rest.abs().sum(-1), limit = diagonal.abs() * kDominance;
  const Tensor share = limit / at::maximum(sums, limit).clamp_min(1e-30);  // at most 1, and exactly 1 within the limit
  return at::diag_embed(diagonal) + rest * share.unsqueeze(-1);
}

}  // namespace baseq
