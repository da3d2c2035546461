#include "baseq/quant/gptq.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <numeric>

#include "finite.h"
#include "gptq_block.h"
#include "grid.h"
#include "input_factor.h"
#include "product.h"

namespace baseq {
namespace {

/// Calibration tokens are folded into the Hessian this many at a time: their products are float32, and long float32
/// sums would lose the small eigenvalues.
constexpr int64_t kHessianChunk = 2048;

/// Columns that are made up for in one product, and those of an inner block: products with few columns are slow, and
/// what a block makes up for inside itself is not done by products.
constexpr int64_t kOuterColumns = 1024;

/// Scale and zero point by columns, [groups, rows]: those of each row, with ones and zeros for padding rows; a
/// tensor-wide grid is repeated.
QParams by_column(const QParams& qparams, int64_t rows, int64_t padded_rows) {
  const auto turn = [&](const Tensor& t, double padding) {
    if (!t.defined()) return Tensor();
    const Tensor turned = at::full({t.size(1), padded_rows}, padding, t.options());
    turned.narrow(1, 0, rows).copy_(t.expand({rows, t.size(1)}).t());
    return turned;
  };
  return {turn(qparams.scale, 1), turn(qparams.zero_point, 0)};
}

/// One weight while its columns are rounded, on its device. All matrices are [columns, rows] in the order of rounding,
/// rows padded with zeros to whole strips.
class ColumnRounding {
 public:
  ColumnRounding(const Tensor& weight, const InputFactor& inputs, const QuantSpec& spec, const GptqOptions& options)
      : inputs_(inputs),
        spec_(spec),
        options_(options),
        rows_(weight.size(0)),
        columns_(weight.size(1)),
        group_size_(spec.strategy == Strategy::kGroup ? spec.group_size : columns_),
        params_on_the_way_(spec.strategy == Strategy::kGroup && !options.static_groups),
        target_(at::zeros({columns_, (rows_ + kRowsInStrip - 1) / kRowsInStrip * kRowsInStrip}, weight.options())),
        codes_(at::empty(target_.sizes(), weight.options().dtype(at::kChar))),
        groups_(inputs.order.floor_divide(group_size_)),
        losses_(at::zeros({target_.size(1) / kRowsInStrip}, weight.options().dtype(at::kDouble))) {
    const Tensor target = inputs.correction.defined()
                              ? weight.index_select(1, inputs.order) +
                                    matrix_product(weight.index_select(1, inputs.order), inputs.correction)
                              : weight.index_select(1, inputs.order);
    target_.narrow(1, 0, rows_).copy_(target.t());
    if (params_on_the_way_) {
      (void)group_view(weight, spec);  // throws when group_size does not divide the columns
      const Tensor empty = at::ones({columns_ / group_size_, target_.size(1)}, weight.options());
      by_column_ = {empty, spec.symmetric ? Tensor() : at::zeros_like(empty)};
    } else {
      qparams_ = params_of(weight, spec);
      by_column_ = by_column(qparams_, rows_, target_.size(1));
    }
  }

  void run() {
    for (int64_t begin = 0; begin < columns_; begin += outer_size()) {
      round_columns(begin, std::min(begin + outer_size(), columns_));
    }
  }

  QuantizedWeight take() const {
    const Tensor codes = codes_.narrow(1, 0, rows_).index_select(0, at::argsort(inputs_.order)).t().contiguous();
    const auto by_row = [&](const Tensor& t) {
      return t.defined() ? t.narrow(1, 0, rows_).t().contiguous() : Tensor();
    };
    if (!params_on_the_way_) return {spec_, codes, qparams_};
    return {spec_, codes, {by_row(by_column_.scale), by_row(by_column_.zero_point)}};
  }

  /// tr(D H D^T), D = target - dequantized.
  double loss() const {
    const Tensor losses = losses_.cpu();
    const auto* first = losses.const_data_ptr<double>();
    return std::max(0.0, std::accumulate(first, first + losses.numel(), 0.0));
  }

 private:
  QParams params_of(const Tensor& w, const QuantSpec& grid) const {
    return options_.mse_clip ? search_qparams(w, grid, options_.search) : compute_qparams(w, grid);
  }

  // A group whose parameters are found on the way has to begin where all earlier columns have been made up for.
  int64_t outer_size() const {
    const int64_t size = std::max(kOuterColumns, options_.block_size);
    return params_on_the_way_ ? std::max(group_size_, size / group_size_ * group_size_) : size;
  }
  int64_t inner_size() const {
    if (!params_on_the_way_) return options_.block_size;
    int64_t size = std::min(options_.block_size, group_size_);
    while (group_size_ % size != 0) --size;
    return size;
  }

  /// Columns [begin, end) with what all columns before them left to make up for.
  Tensor corrected(int64_t begin, int64_t end) const {
    const Tensor target = target_.slice(0, begin, end);
    if (begin == 0) return target.clone();
    if (inputs_.tokens.defined()) return matrix_product(inputs_.responses.slice(0, begin, end), outputs_).add_(target);
    // The columns before hold their errors by now.
    const Tensor feedback = inputs_.feedback.slice(0, begin, end).slice(1, 0, begin).contiguous();
    return matrix_product(feedback, target_.slice(0, 0, begin)).add_(target);
  }

  void find_params(int64_t begin, const Tensor& corrected) {
    QuantSpec one_group = spec_;
    one_group.strategy = Strategy::kChannel;
    const QParams found = params_of(corrected.narrow(1, 0, rows_).t().contiguous(), one_group);
    by_column_.scale.select(0, begin / group_size_).narrow(0, 0, rows_).copy_(found.scale.squeeze(1));
    if (spec_.symmetric) return;
    by_column_.zero_point.select(0, begin / group_size_).narrow(0, 0, rows_).copy_(found.zero_point.squeeze(1));
  }

  void round_columns(int64_t begin, int64_t end) {
    const Tensor current = corrected(begin, end);
    const Tensor feedback = inputs_.tokens.defined() ? matrix_product(inputs_.responses.slice(0, begin, end),
                                                                      inputs_.tokens.slice(1, begin, end).contiguous())
                                                     : inputs_.feedback.slice(0, begin, end).slice(1, begin, end);
    for (int64_t from = begin; from < end; from += inner_size()) {
      const int64_t to = std::min(from + inner_size(), end), first = from - begin, last = to - begin;
      if (params_on_the_way_ && from % group_size_ == 0)
        find_params(from, current.slice(0, first, first + group_size_));
      GptqBlock block{.target = target_.slice(0, from, to),
                      .corrected = current.slice(0, first, last),
                      .feedback = feedback.slice(0, first, last).slice(1, first, last),
                      .codes = codes_.slice(0, from, to),
                      .qparams = by_column_,
                      .groups = groups_.slice(0, from, to),
                      .pivots = inputs_.pivots.slice(0, from, to),
                      .added = inputs_.added.slice(0, from, to),
                      .low = static_cast<float>(code_min(spec_)),
                      .high = static_cast<float>(code_max(spec_)),
                      .first_order = static_cast<float>(options_.first_order)};
      round_block(block, losses_);
      if (to == end) break;
      current.slice(0, last).add_(
          matrix_product(feedback.slice(0, last).slice(1, first, last).contiguous(), block.target));
    }
    if (!inputs_.tokens.defined() || end == columns_) return;
    const Tensor added = matrix_product(inputs_.tokens.slice(1, begin, end).contiguous(), target_.slice(0, begin, end));
    outputs_ = outputs_.defined() ? outputs_.add_(added) : added;
  }

  const InputFactor& inputs_;
  const QuantSpec& spec_;
  const GptqOptions& options_;
  int64_t rows_, columns_, group_size_;
  bool params_on_the_way_;
  Tensor target_;  ///< the weights of columns that are not yet rounded, the errors of the others
  Tensor codes_;
  Tensor groups_;  ///< of each column
  Tensor losses_;  ///< by strip
  QParams qparams_, by_column_;
  Tensor outputs_;  ///< of the errors so far, [num_tokens, rows]; in the token form
};

void check_gptq(const Tensor& weight, const QuantSpec& spec, const GptqOptions& options) {
  check_weight_spec("gptq", spec);
  TORCH_CHECK(weight.dim() == 2 && weight.is_floating_point(), "gptq: weight is ", weight.scalar_type(), " of size ",
              weight.sizes(), ", expected a floating type and [out_features, in_features]");
  TORCH_CHECK(options.block_size > 0 && options.damping >= 0, "gptq: block_size is ", options.block_size,
              " and damping ", options.damping, ", expected a positive and a non-negative number");
  TORCH_CHECK(options.first_order >= 0 && options.first_order <= 1, "gptq: first_order is ", options.first_order,
              ", expected 0 to 1");
  const bool params_on_the_way = spec.strategy == Strategy::kGroup && !options.static_groups;
  TORCH_CHECK(!(params_on_the_way && options.activation_order),
              "gptq: activation_order without static_groups scatters the groups over the columns, which this format "
              "cannot store; expected static_groups = true");
}

/// tr(W H W^T), or the sum of squares where H is not known.
double energy_of(const Tensor& weight, const InputFactor& inputs) {
  if (inputs.moments.defined()) return quadratic_form(weight, inputs.moments);
  if (!inputs.tokens.defined()) return weight.square().sum(at::kDouble).item<double>();
  return linear_product(inputs.tokens, weight.index_select(1, inputs.order)).square_().sum(at::kDouble).item<double>();
}

}  // namespace

Hessian::Hessian(int64_t features) : sum_(at::zeros({features, features}, at::kDouble)) {
  TORCH_CHECK(features > 0, "Hessian: features is ", features, ", expected a positive number");
}

void Hessian::add(const Tensor& x) {
  const int64_t features = sum_.size(0);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == features, "Hessian: x is ", x.sizes(), ", expected [..., ", features, "]");
  const at::NoGradGuard no_grad;
  const Tensor rows = x.reshape({-1, features});
  if (sum_.device() != x.device()) sum_ = sum_.to(x.device());
  for (int64_t begin = 0; begin < rows.size(0); begin += kHessianChunk) {
    const Tensor chunk = rows.slice(0, begin, std::min(begin + kHessianChunk, rows.size(0))).to(at::kFloat);
    sum_.add_(symmetric_product(chunk, chunk));
  }
  num_tokens_ += rows.size(0);
}

Tensor Hessian::mean() const {
  TORCH_CHECK(num_tokens_ > 0, "Hessian: no tokens were added before mean()");
  return sum_ / static_cast<double>(num_tokens_);
}

Tensor second_moments(const Tensor& x) {
  TORCH_CHECK(x.dim() >= 1, "second_moments: x is a scalar, expected inputs [..., features]");
  Hessian hessian(x.size(-1));
  hessian.add(x);
  return hessian.mean();
}

double quadratic_form(const Tensor& matrix, const Tensor& hessian) {
  constexpr int64_t kColumns = 512;
  Tensor total = at::zeros({}, matrix.options().dtype(at::kDouble));
  for (int64_t begin = 0; begin < hessian.size(0); begin += kColumns) {
    const int64_t end = std::min(begin + kColumns, hessian.size(0));
    Tensor block = hessian.slice(0, 0, end).slice(1, begin, end).to(at::kFloat, false, /*copy=*/true);
    block.slice(0, 0, begin).mul_(2);
    const Tensor product = matrix_product(matrix.slice(1, 0, end), block);
    total.add_(product.mul_(matrix.slice(1, begin, end)).sum(at::kDouble));
  }
  return total.item<double>();
}

QuantizedWeight round_to_nearest(const Tensor& weight, const QuantSpec& spec, bool mse_clip, const MseSearch& search) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_floating_point(), "round_to_nearest: weight is ", weight.scalar_type(),
              " of size ", weight.sizes(), ", expected a floating type and [out_features, in_features]");
  check_weight_spec("round_to_nearest", spec);
  const at::NoGradGuard no_grad;
  const Tensor source = weight.to(at::kFloat);
  TORCH_CHECK(all_finite(source), "round_to_nearest: weight has a value that is not finite");
  const QParams qparams = mse_clip ? search_qparams(source, spec, search) : compute_qparams(source, spec);
  return {spec, quantize(source, qparams, spec), qparams};
}

GptqResult gptq(const Tensor& weight, const InputFactor& inputs, const QuantSpec& spec, const GptqOptions& options) {
  check_gptq(weight, spec, options);
  const at::NoGradGuard no_grad;
  const Tensor source = weight.to(at::kFloat).contiguous();
  TORCH_CHECK(all_finite(source), "gptq: weight has a value that is not finite");
  GptqResult result{.weight = {spec, {}, {}}, .damping = inputs.damping};
  const double energy = energy_of(source, inputs);
  double loss = 0;
  if (inputs.defined()) {
    ColumnRounding rounding(source, inputs, spec, options);
    rounding.run();
    result.weight = rounding.take();
    loss = rounding.loss();
  } else {
    result.weight = round_to_nearest(source, spec, options.mse_clip, options.search);
    result.fell_back_to_rtn = true;
  }
  // What the columns lost is beside the corrected weights, where there is a correction; FOEM does not sum it.
  if (!inputs.defined() || inputs.correction.defined() || options.first_order != 0) {
    loss = energy_of(result.weight.dequantized().sub_(source), inputs);
  }
  result.relative_error = energy == 0 ? 0 : loss / energy;
  return result;
}

GptqResult gptq(const Tensor& weight, const Tensor& hessian, const QuantSpec& spec, const GptqOptions& options,
                const Tensor& cross) {
  check_gptq(weight, spec, options);
  const int64_t columns = weight.size(1);
  TORCH_CHECK(hessian.sizes() == at::IntArrayRef({columns, columns}), "gptq: hessian is ", hessian.sizes(),
              " but weight is ", weight.sizes());
  TORCH_CHECK(!cross.defined() || cross.sizes() == hessian.sizes(), "gptq: cross is ", cross.sizes(),
              " but hessian is ", hessian.sizes());
  TORCH_CHECK(all_finite(hessian), "gptq: hessian has a value that is not finite");
  const auto there = [&](const Tensor& t) { return t.defined() ? t.to(weight.device()) : t; };
  return gptq(weight, factor_moments(there(hessian), options, there(cross)), spec, options);
}

}  // namespace baseq
