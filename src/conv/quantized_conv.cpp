#include "baseq/conv/quantized_conv.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "int8_product.h"
#include "tiles.h"

namespace baseq {
namespace {

void check_quantization(const char* who, const ConvQuantization& quantization) {
  for (const QuantSpec* spec : {&quantization.weights, &quantization.activations}) {
    TORCH_CHECK(spec->symmetric && !spec->dynamic &&
                    (spec->strategy == Strategy::kChannel || spec->strategy == Strategy::kTensor),
                who, ": the grid of ", spec == &quantization.weights ? "weights" : "activations",
                " is asymmetric, dynamic, in groups or of tokens; expected a static symmetric one with "
                "Strategy::kChannel (a scale for each frequency) or Strategy::kTensor");
  }
}

QParams qparams_of(const Tensor& rows, const QuantSpec& spec, const std::optional<MseSearch>& search) {
  return search ? search_qparams(rows, spec, *search) : compute_qparams(rows, spec);
}

/// What a quantizer needs of a grid whose scales are given by their logarithms, for `rows` rows.
QParams qparams_from(const Tensor& log_scale) { return {log_scale.exp().reshape({-1, 1}), {}}; }

/// Bytes of the transforms and sums that a thread works on at a time: about its share of the second and third cache.
constexpr int64_t kTileWorkspace = int64_t{1} << 21;

double largest_code(const QuantSpec& spec) { return static_cast<double>((int64_t{1} << (spec.num_bits - 1)) - 1); }

}  // namespace

Tensor transformed_input(const Tensor& x, const ConvAlgorithm2d& algorithm, const Padding& padding) {
  const TileGrid grid = tile_grid("transformed_input", x, algorithm, padding);
  const at::NoGradGuard no_grad;
  const Tensor last = x.to(at::kFloat).contiguous(at::MemoryFormat::ChannelsLast);
  const TilePlan plan(algorithm);
  Tensor result = at::empty({plan.products, grid.num_tiles(), grid.channels}, last.options().memory_format({}));
  transform_input(plan, grid, last.const_data_ptr<float>(), 0, grid.num_tiles(), result.mutable_data_ptr<float>());
  return result;
}

Tensor transformed_weight(const Tensor& weight, const ConvAlgorithm2d& algorithm) {
  return transformed_filters(weight, algorithm).div(static_cast<double>(algorithm.divisor)).to(at::kFloat);
}

QuantizedConv2d quantize_conv2d(const Tensor& weight, const Tensor& bias, const Tensor& x,
                                const ConvAlgorithm2d& algorithm, const Padding& padding,
                                const ConvQuantization& quantization) {
  const at::NoGradGuard no_grad;
  check_quantization("quantize_conv2d", quantization);
  const Tensor tiles = transformed_input(x, algorithm, padding).flatten(1);
  check_filters("quantize_conv2d", weight, bias, x.size(1), algorithm);
  const Tensor filters = transformed_weight(weight, algorithm);
  const QParams of_input = qparams_of(tiles, quantization.activations, quantization.search);
  const QParams of_weight = qparams_of(filters, quantization.weights, quantization.search);
  QuantizedConv2d layer{.algorithm = algorithm,
                        .padding = padding,
                        .weights = quantization.weights,
                        .activations = quantization.activations};
  layer.weight_codes = quantize(filters, of_weight, quantization.weights);
  layer.weight_scale =
      of_weight.scale.flatten().expand({filters.size(0) * filters.size(1)}).view({-1, filters.size(1)});
  layer.input_scale = of_input.scale.flatten().expand({filters.size(0)}).contiguous();
  if (bias.defined()) layer.bias = bias.to(at::kFloat).contiguous();
  return layer;
}

Tensor simulate_conv2d(const Tensor& x, const Tensor& weight, const Tensor& bias, const ConvAlgorithm2d& algorithm,
                       const Padding& padding, const ConvQuantization& quantization, const Tensor& log_weight_scale,
                       const Tensor& log_input_scale) {
  check_quantization("simulate_conv2d", quantization);
  const TileGrid grid = tile_grid("simulate_conv2d", x, algorithm, padding);
  check_filters("simulate_conv2d", weight, bias, x.size(1), algorithm);
  const ConvAlgorithm &rows = algorithm.rows, &cols = algorithm.cols;
  const int64_t height = grid.tiles_down * rows.outputs + rows.taps - 1;
  const int64_t width = grid.tiles_across * cols.outputs + cols.taps - 1;
  const Tensor padded = at::constant_pad_nd(x.to(at::kFloat), {padding.left, width - grid.width - padding.left,
                                                               padding.top, height - grid.height - padding.top});
  // [samples, batch * tiles * in_channels]
  const Tensor windows = padded.unfold(2, rows.num_inputs(), rows.outputs)
                             .unfold(3, cols.num_inputs(), cols.outputs)
                             .permute({4, 5, 0, 2, 3, 1})
                             .reshape({rows.num_inputs() * cols.num_inputs(), -1});
  const auto real = [&](const Tensor& matrix) { return matrix.to(windows.options()); };
  const Tensor tiles = fake_quantize(real(algorithm.input_matrix()).matmul(windows), qparams_from(log_input_scale),
                                     quantization.activations);
  const Tensor filters =
      fake_quantize(transformed_weight(weight, algorithm), qparams_from(log_weight_scale), quantization.weights);
  const Tensor products =
      tiles.view({algorithm.num_products(), -1, grid.channels}).bmm(filters.transpose(1, 2)).flatten(1);
  Tensor y =
      real(algorithm.output_matrix())
          .matmul(products)
          .view({rows.outputs, cols.outputs, grid.batch, grid.tiles_down, grid.tiles_across, weight.size(0)})
          .permute({2, 5, 3, 0, 4, 1})
          .reshape({grid.batch, weight.size(0), grid.tiles_down * rows.outputs, grid.tiles_across * cols.outputs})
          .slice(2, 0, grid.out_height)
          .slice(3, 0, grid.out_width);
  return bias.defined() ? y + bias.view({-1, 1, 1}) : y;
}

struct IntegerConv2d::Prepared {
  explicit Prepared(QuantizedConv2d given)
      : layer(std::move(given)), plan(layer.algorithm), weights(layer.weight_codes, has_vnni()) {
    const int64_t channels = layer.weight_codes.size(1);
    const int64_t row = (channels + kChannelBlock - 1) / kChannelBlock * kChannelBlock;
    inverse_scale = layer.input_scale.reciprocal();
    scale = at::constant_pad_nd(layer.weight_scale * layer.input_scale.unsqueeze(1), {0, row - channels}).contiguous();
  }

  QuantizedConv2d layer;
  TilePlan plan;
  Int8Weights weights;
  Tensor inverse_scale;  ///< [products]
  Tensor scale;          ///< [products, out_channels rounded up]
};

IntegerConv2d::IntegerConv2d(QuantizedConv2d layer) {
  const int64_t products = layer.algorithm.num_products();
  TORCH_CHECK(layer.weight_codes.dim() == 3 && layer.weight_codes.size(0) == products &&
                  layer.weight_codes.scalar_type() == at::kChar && layer.weight_codes.device().is_cpu(),
              "IntegerConv2d: weight_codes are ", layer.weight_codes.sizes(), " of ", layer.weight_codes.scalar_type(),
              " on ", layer.weight_codes.device(), ", expected [", products,
              ", out_channels, in_channels] of int8 on the CPU");
  TORCH_CHECK(layer.weight_scale.sizes() == layer.weight_codes.sizes().slice(0, 2) &&
                  layer.input_scale.sizes() == at::IntArrayRef({products}),
              "IntegerConv2d: weight_scale is ", layer.weight_scale.sizes(), " and input_scale ",
              layer.input_scale.sizes(), ", expected [", products, ", out_channels] and [", products, "]");
  prepared_ = std::make_unique<const Prepared>(std::move(layer));
}

IntegerConv2d::~IntegerConv2d() = default;
IntegerConv2d::IntegerConv2d(IntegerConv2d&&) noexcept = default;

const QuantizedConv2d& IntegerConv2d::layer() const { return prepared_->layer; }

Tensor IntegerConv2d::operator()(const Tensor& x) const {
  const at::NoGradGuard no_grad;
  const auto& [layer, plan, weights, inverse_scale, scale] = *prepared_;
  const int64_t in = layer.weight_codes.size(2), out = layer.weight_codes.size(1);
  const TileGrid grid = tile_grid("IntegerConv2d", x, layer.algorithm, layer.padding);
  TORCH_CHECK(x.size(1) == in && x.scalar_type() == at::kFloat && x.device().is_cpu(), "IntegerConv2d: x is ",
              x.sizes(), " of ", x.scalar_type(), " on ", x.device(), ", expected [batch, ", in,
              ", height, width] of float32 on the CPU");
  const Tensor last = x.contiguous(at::MemoryFormat::ChannelsLast);
  Tensor result = at::empty({grid.batch, out, grid.out_height, grid.out_width},
                            x.options().memory_format(at::MemoryFormat::ChannelsLast));
  const CodeGrid codes{inverse_scale.const_data_ptr<float>(), static_cast<float>(-largest_code(layer.activations) - 1),
                       static_cast<float>(largest_code(layer.activations))};
  const float* bias = layer.bias.defined() ? layer.bias.const_data_ptr<float>() : nullptr;
  const int64_t shared = (grid.num_tiles() + at::get_num_threads() - 1) / at::get_num_threads();
  const int64_t block = std::min(shared, tiles_per_block(plan, in + 4 * out, kTileWorkspace));
  at::parallel_for(0, (grid.num_tiles() + block - 1) / block, 1, [&](int64_t first, int64_t last_block) {
    const auto tiles = std::make_unique_for_overwrite<uint8_t[]>(plan.products * block * in + 3);
    const auto products = std::make_unique_for_overwrite<int32_t[]>(plan.products * block * out);
    for (int64_t begin = first * block; begin < std::min(last_block * block, grid.num_tiles()); begin += block) {
      const int64_t end = std::min(begin + block, grid.num_tiles());
      transform_input(plan, grid, last.const_data_ptr<float>(), begin, end, tiles.get(), codes);
      weights.multiply(tiles.get(), end - begin, products.get());
      transform_output(plan, grid, out, products.get(), scale.const_data_ptr<float>(), begin, end, bias,
                       result.mutable_data_ptr<float>());
    }
  });
  return result;
}

}  // namespace baseq
