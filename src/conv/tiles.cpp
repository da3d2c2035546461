#include "tiles.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>
#include <vector>

namespace baseq {
namespace {

SparseRows sparse_rows(const Tensor& matrix) {
  SparseRows result;
  if (!matrix.defined()) return {{0}, {}, {}};
  const auto entries = matrix.accessor<int64_t, 2>();
  for (int64_t row = 0; row < matrix.size(0); ++row) {
    result.begin.push_back(static_cast<int32_t>(result.column.size()));
    for (int64_t column = 0; column < matrix.size(1); ++column) {
      if (entries[row][column] == 0) continue;
      result.column.push_back(static_cast<int32_t>(column));
      result.value.push_back(static_cast<int32_t>(entries[row][column]));
    }
  }
  result.begin.push_back(static_cast<int32_t>(result.column.size()));
  return result;
}

/// Sixteen neighbouring channels; a tile's value is kSets of them.
constexpr int64_t kLanes = 16, kBlock = kChannelBlock, kSets = kBlock / kLanes;
template <class T>
using Lanes __attribute__((vector_size(kLanes * sizeof(T)), aligned(sizeof(T)), may_alias)) = T;

/// out[row] = sum over a row's entries of value * in[column], vectors `stride` elements apart.
template <class T>
[[gnu::always_inline]] inline void apply(const SparseRows& matrix, const T* in, int64_t in_stride, T* out,
                                         int64_t out_stride) {
  const int64_t rows = matrix.num_rows();
  const int32_t *begin = matrix.begin.data(), *column = matrix.column.data(), *value = matrix.value.data();
  for (int64_t row = 0; row < rows; ++row) {
    Lanes<T> sums[kSets] = {};
    for (int32_t i = begin[row]; i < begin[row + 1]; ++i) {
      const T* source = in + column[i] * in_stride;
      const T factor = static_cast<T>(value[i]);
      for (int64_t s = 0; s < kSets; ++s) {
        sums[s] += *reinterpret_cast<const Lanes<T>*>(source + s * kLanes) * factor;
      }
    }
    for (int64_t s = 0; s < kSets; ++s) *reinterpret_cast<Lanes<T>*>(out + row * out_stride + s * kLanes) = sums[s];
  }
}

/// cols (rows x): `rows` runs down the columns of x `[down, across]`, `cols` along the rows of what that gives.
template <class T>
[[gnu::always_inline]] inline void apply_both(const SparseRows& rows, const SparseRows& cols, int64_t across,
                                              int64_t out_across, const T* x, T* between, T* out) {
  for (int64_t j = 0; j < across; ++j) {
    apply(rows, x + j * kBlock, across * kBlock, between + j * kBlock, across * kBlock);
  }
  for (int64_t i = 0; i < rows.num_rows(); ++i) {
    apply(cols, between + i * across * kBlock, kBlock, out + i * out_across * kBlock, kBlock);
  }
}

/// Memory for one block of channels of one tile at each step.
template <class T>
struct Scratch {
  explicit Scratch(int64_t values)
      : memory(std::make_unique_for_overwrite<T[]>(3 * values * kBlock)), step(values * kBlock) {}
  T* operator[](int64_t i) { return memory.get() + i * step; }
  std::unique_ptr<T[]> memory;
  int64_t step;
};

template <class T>
Scratch<T> scratch_for(const TilePlan& plan) {
  const int64_t down = std::max({plan.inputs_down, plan.folded_down, plan.outputs_down});
  const int64_t across = std::max({plan.inputs_across, plan.folded_across, plan.outputs_across});
  return Scratch<T>(std::max(down * across, plan.products));
}

struct TilePosition {
  int64_t image, row, column;  ///< of the tile's first output
};
TilePosition position_of(const TilePlan& plan, const TileGrid& grid, int64_t tile) {
  const int64_t in_image = tile % (grid.tiles_down * grid.tiles_across);
  return {tile / (grid.tiles_down * grid.tiles_across), in_image / grid.tiles_across * plan.outputs_down,
          in_image % grid.tiles_across * plan.outputs_across};
}

/// The samples of a tile, zero outside the image and beyond the last channel.
template <class In, class T>
[[gnu::always_inline]] inline void gather(const TilePlan& plan, const TileGrid& grid, const In* x, int64_t tile,
                                          int64_t channel, int64_t channels, T* out) {
  const auto [image, first_row, first_column] = position_of(plan, grid, tile);
  for (int64_t i = 0; i < plan.inputs_down; ++i) {
    const int64_t row = first_row + i - grid.top;
    for (int64_t j = 0; j < plan.inputs_across; ++j, out += kBlock) {
      const int64_t column = first_column + j - grid.left;
      if (row < 0 || row >= grid.height || column < 0 || column >= grid.width) {
        std::fill_n(out, kBlock, T(0));
        continue;
      }
      const In* source = x + ((image * grid.height + row) * grid.width + column) * grid.channels + channel;
      if (channels == kBlock) {
        for (int64_t c = 0; c < kBlock; ++c) out[c] = static_cast<T>(source[c]);
      } else {
        for (int64_t c = 0; c < kBlock; ++c) out[c] = c < channels ? static_cast<T>(source[c]) : T(0);
      }
    }
  }
}

/// `store(product, values, target)` writes the kBlock values of a product to target, kBlock elements.
template <class T, class In, class Out, class Store>
[[gnu::always_inline]] inline void input_loop(const TilePlan& plan, const TileGrid& grid, const In* x, int64_t first,
                                              int64_t begin, int64_t end, int64_t tiles, Out* out, Scratch<T>& scratch,
                                              const Store& store) {
  for (int64_t tile = begin; tile < end; ++tile) {
    for (int64_t channel = 0; channel < grid.channels; channel += kBlock) {
      const int64_t channels = std::min(kBlock, grid.channels - channel);
      gather(plan, grid, x, tile, channel, channels, scratch[0]);
      apply_both(plan.input_rows, plan.input_cols, plan.inputs_across, plan.folded_across, scratch[0], scratch[1],
                 scratch[2]);
      T* values = scratch[2];
      if (plan.input_mix.num_rows() > 0) {
        apply(plan.input_mix, scratch[2], kBlock, scratch[0], kBlock);
        values = scratch[0];
      }
      Out* target = out + (tile - first) * grid.channels + channel;
      for (int64_t p = 0; p < plan.products; ++p, values += kBlock, target += tiles * grid.channels) {
        if (channels == kBlock) {
          store(p, values, target);
        } else {
          Out whole[kBlock];
          store(p, values, whole);
          std::copy_n(whole, channels, target);
        }
      }
    }
  }
}

/// `load(product, source, channel, out)` reads kBlock products, of which the first `channels` count.
template <class T, class Product, class Out, class Load, class Finish>
[[gnu::always_inline]] inline void output_loop(const TilePlan& plan, const TileGrid& grid, int64_t out_channels,
                                               const Product* products, int64_t first, int64_t begin, int64_t end,
                                               int64_t tiles, Out* out, Scratch<T>& scratch, const Load& load,
                                               const Finish& finish) {
  const bool mixed = plan.output_mix.num_rows() > 0;
  for (int64_t tile = begin; tile < end; ++tile) {
    const auto [image, first_row, first_column] = position_of(plan, grid, tile);
    const int64_t rows = std::min(plan.outputs_down, grid.out_height - first_row);
    const int64_t columns = std::min(plan.outputs_across, grid.out_width - first_column);
    for (int64_t channel = 0; channel < out_channels; channel += kBlock) {
      const int64_t channels = std::min(kBlock, out_channels - channel);
      const Product* source = products + (tile - first) * out_channels + channel;
      T* values = scratch[mixed ? 1 : 0];
      for (int64_t p = 0; p < plan.products; ++p, values += kBlock, source += tiles * out_channels) {
        if (channels == kBlock) {
          load(p, source, channel, values);
        } else {
          Product whole[kBlock] = {};
          std::copy_n(source, channels, whole);
          load(p, whole, channel, values);
        }
      }
      if (mixed) apply(plan.output_mix, scratch[1], kBlock, scratch[0], kBlock);
      apply_both(plan.output_rows, plan.output_cols, plan.folded_across, plan.outputs_across, scratch[0], scratch[1],
                 scratch[2]);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          Out* target =
              out + ((image * grid.out_height + first_row + i) * grid.out_width + first_column + j) * out_channels;
          const T* y = scratch[2] + (i * plan.outputs_across + j) * kBlock;
          if (channels == kBlock) {
            for (int64_t c = 0; c < kBlock; ++c) target[channel + c] = finish(y[c], channel + c);
          } else {
            for (int64_t c = 0; c < channels; ++c) target[channel + c] = finish(y[c], channel + c);
          }
        }
      }
    }
  }
}

template <class T, class Body>
void over_tiles(const TilePlan& plan, int64_t begin, int64_t end, const Body& body) {
  at::parallel_for(begin, end, 4, [&](int64_t from, int64_t to) {
    Scratch<T> scratch = scratch_for<T>(plan);
    body(from, to, scratch);
  });
}

/// What the loops below share; one structure keeps the compiled versions for the instruction sets few and short.
struct Job {
  const TilePlan& plan;
  const TileGrid& grid;
  int64_t first, tiles, channels;
};

template <class T, class Out>
struct Convert {
  [[gnu::always_inline]] void operator()(int64_t, const T* values, Out* target) const {
    for (int64_t c = 0; c < kBlock; ++c) target[c] = static_cast<Out>(values[c]);
  }
};

struct Quantize {
  CodeGrid codes;
  [[gnu::always_inline]] void operator()(int64_t product, const float* values, uint8_t* target) const {
    // Adding and taking away 1.5 * 2^23 rounds to the nearest integer, halves to even.
    constexpr float kRounder = 12582912.0F;
    const float factor = codes.inverse_scale[product];
    for (int64_t c = 0; c < kBlock; ++c) {
      float code = values[c] * factor;
      code = code < codes.low ? codes.low : code;
      code = code > codes.high ? codes.high : code;
      target[c] = static_cast<uint8_t>(static_cast<int32_t>((code + kRounder) - kRounder) + 128);
    }
  }
};

template <class T>
struct Load {
  template <class Product>
  [[gnu::always_inline]] void operator()(int64_t, const Product* source, int64_t, T* values) const {
    for (int64_t c = 0; c < kBlock; ++c) values[c] = static_cast<T>(source[c]);
  }
};

struct LoadScaled {
  const float* scale;  ///< [products, row]; a row has a whole number of blocks
  int64_t row;
  [[gnu::always_inline]] void operator()(int64_t product, const int32_t* source, int64_t channel, float* values) const {
    const float* factor = scale + product * row + channel;
    for (int64_t c = 0; c < kBlock; ++c) values[c] = static_cast<float>(source[c]) * factor[c];
  }
};

template <class T>
struct FinishReal {
  T factor;
  const T* bias;
  [[gnu::always_inline]] T operator()(T value, int64_t channel) const {
    return bias != nullptr ? value * factor + bias[channel] : value * factor;
  }
};

/// Unsigned sums wrap around; the signed value of the whole is right when it fits.
template <class Signed>
struct FinishExact {
  Signed divisor;
  const int32_t* bias;
  template <class Unsigned>
  [[gnu::always_inline]] int32_t operator()(Unsigned value, int64_t channel) const {
    const auto quotient = static_cast<int32_t>(static_cast<Signed>(value) / divisor);
    return bias != nullptr ? quotient + bias[channel] : quotient;
  }
};

__attribute__((target_clones("avx512f", "avx2", "default"))) void input_chunk(const Job& job, const float* x,
                                                                              int64_t begin, int64_t end, float* out,
                                                                              Scratch<float>& scratch) {
  input_loop(job.plan, job.grid, x, job.first, begin, end, job.tiles, out, scratch, Convert<float, float>());
}
__attribute__((target_clones("avx512f", "avx2", "default"))) void input_chunk(const Job& job, const double* x,
                                                                              int64_t begin, int64_t end, double* out,
                                                                              Scratch<double>& scratch) {
  input_loop(job.plan, job.grid, x, job.first, begin, end, job.tiles, out, scratch, Convert<double, double>());
}
__attribute__((target_clones("avx512f", "avx2", "default"))) void input_chunk(const Job& job, const int8_t* x,
                                                                              int64_t begin, int64_t end, int16_t* out,
                                                                              Scratch<int32_t>& scratch) {
  input_loop(job.plan, job.grid, x, job.first, begin, end, job.tiles, out, scratch, Convert<int32_t, int16_t>());
}
__attribute__((target_clones("avx512f", "avx2", "default"))) void input_chunk(const Job& job, const float* x,
                                                                              int64_t begin, int64_t end, uint8_t* out,
                                                                              const CodeGrid& codes,
                                                                              Scratch<float>& scratch) {
  input_loop(job.plan, job.grid, x, job.first, begin, end, job.tiles, out, scratch, Quantize{codes});
}

__attribute__((target_clones("avx512f", "avx2", "default"))) void output_chunk(const Job& job, const float* products,
                                                                               int64_t begin, int64_t end,
                                                                               const FinishReal<float>& finish,
                                                                               float* out, Scratch<float>& scratch) {
  output_loop(job.plan, job.grid, job.channels, products, job.first, begin, end, job.tiles, out, scratch, Load<float>(),
              finish);
}
__attribute__((target_clones("avx512f", "avx2", "default"))) void output_chunk(const Job& job, const double* products,
                                                                               int64_t begin, int64_t end,
                                                                               const FinishReal<double>& finish,
                                                                               double* out, Scratch<double>& scratch) {
  output_loop(job.plan, job.grid, job.channels, products, job.first, begin, end, job.tiles, out, scratch,
              Load<double>(), finish);
}
__attribute__((target_clones("avx512f", "avx2", "default"))) void output_chunk(const Job& job, const int32_t* products,
                                                                               int64_t begin, int64_t end,
                                                                               const FinishExact<int32_t>& finish,
                                                                               int32_t* out,
                                                                               Scratch<uint32_t>& scratch) {
  output_loop(job.plan, job.grid, job.channels, products, job.first, begin, end, job.tiles, out, scratch,
              Load<uint32_t>(), finish);
}
__attribute__((target_clones("avx512f", "avx2", "default"))) void output_chunk(const Job& job, const int64_t* products,
                                                                               int64_t begin, int64_t end,
                                                                               const FinishExact<int64_t>& finish,
                                                                               int32_t* out,
                                                                               Scratch<uint64_t>& scratch) {
  output_loop(job.plan, job.grid, job.channels, products, job.first, begin, end, job.tiles, out, scratch,
              Load<uint64_t>(), finish);
}
__attribute__((target_clones("avx512f", "avx2", "default"))) void output_chunk(const Job& job, const int32_t* products,
                                                                               const LoadScaled& load, int64_t begin,
                                                                               int64_t end,
                                                                               const FinishReal<float>& finish,
                                                                               float* out, Scratch<float>& scratch) {
  output_loop(job.plan, job.grid, job.channels, products, job.first, begin, end, job.tiles, out, scratch, load, finish);
}

template <class T, class In, class Out>
void input_of(const TilePlan& plan, const TileGrid& grid, const In* x, int64_t begin, int64_t end, Out* out) {
  const Job job{plan, grid, begin, end - begin, grid.channels};
  over_tiles<T>(plan, begin, end,
                [&](int64_t from, int64_t to, Scratch<T>& scratch) { input_chunk(job, x, from, to, out, scratch); });
}

template <class T, class Product, class Finish, class Out>
void output_of(const TilePlan& plan, const TileGrid& grid, int64_t channels, const Product* products, int64_t begin,
               int64_t end, const Finish& finish, Out* out) {
  const Job job{plan, grid, begin, end - begin, channels};
  over_tiles<T>(plan, begin, end, [&](int64_t from, int64_t to, Scratch<T>& scratch) {
    output_chunk(job, products, from, to, finish, out, scratch);
  });
}

}  // namespace

TilePlan::TilePlan(const ConvAlgorithm2d& algorithm)
    : input_rows(sparse_rows(algorithm.rows.input_transform)),
      input_cols(sparse_rows(algorithm.cols.input_transform)),
      input_mix(sparse_rows(algorithm.input_mix)),
      output_rows(sparse_rows(algorithm.rows.output_transform)),
      output_cols(sparse_rows(algorithm.cols.output_transform)),
      output_mix(sparse_rows(algorithm.output_mix)),
      inputs_down(algorithm.rows.num_inputs()),
      inputs_across(algorithm.cols.num_inputs()),
      folded_down(algorithm.rows.num_products()),
      folded_across(algorithm.cols.num_products()),
      outputs_down(algorithm.rows.outputs),
      outputs_across(algorithm.cols.outputs),
      products(algorithm.num_products()),
      divisor(algorithm.divisor) {}

TileGrid tile_grid(const char* who, const Tensor& x, const ConvAlgorithm2d& algorithm, const Padding& padding) {
  TORCH_CHECK(x.dim() == 4, who, ": x is ", x.sizes(), ", expected [batch, in_channels, height, width]");
  TORCH_CHECK(std::min({padding.top, padding.bottom, padding.left, padding.right}) >= 0, who, ": padding is ",
              padding.top, ", ", padding.bottom, ", ", padding.left, ", ", padding.right, ", expected none below zero");
  TileGrid grid{.batch = x.size(0), .channels = x.size(1), .height = x.size(2), .width = x.size(3)};
  grid.top = padding.top;
  grid.left = padding.left;
  grid.out_height = grid.height + padding.top + padding.bottom - algorithm.rows.taps + 1;
  grid.out_width = grid.width + padding.left + padding.right - algorithm.cols.taps + 1;
  TORCH_CHECK(x.numel() > 0 && grid.out_height > 0 && grid.out_width > 0, who, ": x of ", x.sizes(),
              " with its padding is empty or smaller than the kernel of ", algorithm.rows.taps, " x ",
              algorithm.cols.taps);
  grid.tiles_down = (grid.out_height + algorithm.rows.outputs - 1) / algorithm.rows.outputs;
  grid.tiles_across = (grid.out_width + algorithm.cols.outputs - 1) / algorithm.cols.outputs;
  return grid;
}

int64_t tiles_per_block(const TilePlan& plan, int64_t bytes_per_product_and_tile, int64_t bytes) {
  return std::max<int64_t>(12, bytes / (plan.products * bytes_per_product_and_tile));
}

void transform_input(const TilePlan& plan, const TileGrid& grid, const float* x, int64_t begin, int64_t end,
                     float* out) {
  input_of<float>(plan, grid, x, begin, end, out);
}

void transform_input(const TilePlan& plan, const TileGrid& grid, const double* x, int64_t begin, int64_t end,
                     double* out) {
  input_of<double>(plan, grid, x, begin, end, out);
}

void transform_input(const TilePlan& plan, const TileGrid& grid, const int8_t* x, int64_t begin, int64_t end,
                     int16_t* out) {
  input_of<int32_t>(plan, grid, x, begin, end, out);
}

void transform_input(const TilePlan& plan, const TileGrid& grid, const float* x, int64_t begin, int64_t end,
                     uint8_t* out, const CodeGrid& codes) {
  const Job job{plan, grid, begin, end - begin, grid.channels};
  over_tiles<float>(plan, begin, end, [&](int64_t from, int64_t to, Scratch<float>& scratch) {
    input_chunk(job, x, from, to, out, codes, scratch);
  });
}

void transform_output(const TilePlan& plan, const TileGrid& grid, int64_t channels, const float* products,
                      int64_t begin, int64_t end, const float* bias, float* out) {
  const FinishReal<float> finish{1 / static_cast<float>(plan.divisor), bias};
  output_of<float>(plan, grid, channels, products, begin, end, finish, out);
}

void transform_output(const TilePlan& plan, const TileGrid& grid, int64_t channels, const double* products,
                      int64_t begin, int64_t end, const double* bias, double* out) {
  const FinishReal<double> finish{1 / static_cast<double>(plan.divisor), bias};
  output_of<double>(plan, grid, channels, products, begin, end, finish, out);
}

void transform_output(const TilePlan& plan, const TileGrid& grid, int64_t channels, const int32_t* products,
                      int64_t begin, int64_t end, const int32_t* bias, int32_t* out) {
  const FinishExact<int32_t> finish{static_cast<int32_t>(plan.divisor), bias};
  output_of<uint32_t>(plan, grid, channels, products, begin, end, finish, out);
}

void transform_output(const TilePlan& plan, const TileGrid& grid, int64_t channels, const int64_t* products,
                      int64_t begin, int64_t end, const int32_t* bias, int32_t* out) {
  output_of<uint64_t>(plan, grid, channels, products, begin, end, FinishExact<int64_t>{plan.divisor, bias}, out);
}

void transform_output(const TilePlan& plan, const TileGrid& grid, int64_t channels, const int32_t* products,
                      const float* scale, int64_t begin, int64_t end, const float* bias, float* out) {
  const Job job{plan, grid, begin, end - begin, channels};
  const LoadScaled load{scale, (channels + kBlock - 1) / kBlock * kBlock};
  over_tiles<float>(plan, begin, end, [&](int64_t from, int64_t to, Scratch<float>& scratch) {
    output_chunk(job, products, load, from, to, FinishReal<float>{1, bias}, out, scratch);
  });
}

}  // namespace baseq
