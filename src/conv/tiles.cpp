#include "tiles.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <bit>
#include <memory>
#include <type_traits>

#include "axis_transform.h"

namespace baseq {
namespace {

/// x `[rows.inputs, cols.inputs]` of blocks to `out` `[rows.products, cols.products]`.
template <class T>
[[gnu::always_inline]] inline void to_products(const TilePlan& plan, T* x, int64_t row_stride, int64_t column_stride,
                                               T* between, T* out) {
  const int64_t across = plan.cols.inputs;
  for (int64_t j = 0; j < across; ++j) {
    to_products<T>(plan.rows, {x + j * column_stride, row_stride}, {between + j * kBlock, across * kBlock});
  }
  for (int64_t i = 0; i < plan.rows.products; ++i) {
    to_products<T>(plan.cols, {between + i * across * kBlock, kBlock}, {out + i * plan.cols.products * kBlock, kBlock});
  }
}

/// m `[rows.products, cols.products]` of blocks to `out` `[rows.outputs, cols.outputs]`.
template <class T>
[[gnu::always_inline]] inline void to_outputs(const TilePlan& plan, T* m, T* between, T* out) {
  const int64_t across = plan.cols.products;
  for (int64_t j = 0; j < across; ++j) {
    to_outputs<T>(plan.rows, {m + j * kBlock, across * kBlock}, {between + j * kBlock, across * kBlock});
  }
  for (int64_t i = 0; i < plan.rows.outputs; ++i) {
    to_outputs<T>(plan.cols, {between + i * across * kBlock, kBlock}, {out + i * plan.cols.outputs * kBlock, kBlock});
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
  const int64_t down = std::max({plan.rows.inputs, plan.rows.products, plan.rows.outputs});
  const int64_t across = std::max({plan.cols.inputs, plan.cols.products, plan.cols.outputs});
  return Scratch<T>(std::max(down * across, plan.products));
}

struct TilePosition {
  int64_t image, row, column;  ///< of the tile's first output
};
TilePosition position_of(const TilePlan& plan, const TileGrid& grid, int64_t tile) {
  const int64_t in_image = tile % (grid.tiles_down * grid.tiles_across);
  return {tile / (grid.tiles_down * grid.tiles_across), in_image / grid.tiles_across * plan.rows.outputs,
          in_image % grid.tiles_across * plan.cols.outputs};
}

/// The samples of a tile, zero outside the image and beyond the last channel.
template <class In, class T>
[[gnu::always_inline]] inline void gather(const TilePlan& plan, const TileGrid& grid, const In* x, int64_t tile,
                                          int64_t channel, int64_t channels, T* out) {
  const auto [image, first_row, first_column] = position_of(plan, grid, tile);
  for (int64_t i = 0; i < plan.rows.inputs; ++i) {
    const int64_t row = first_row + i - grid.top;
    for (int64_t j = 0; j < plan.cols.inputs; ++j, out += kBlock) {
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
      bool is_inside = false;
      if constexpr (std::is_same_v<In, T>) {
        const auto [image, first_row, first_column] = position_of(plan, grid, tile);
        const int64_t row = first_row - grid.top, column = first_column - grid.left;
        is_inside = channels == kBlock && row >= 0 && column >= 0 && row + plan.rows.inputs <= grid.height &&
                    column + plan.cols.inputs <= grid.width;
        if (is_inside) {
          // Read in place; nothing writes through the pointer.
          T* samples =
              const_cast<T*>(x) + ((image * grid.height + row) * grid.width + column) * grid.channels + channel;
          to_products(plan, samples, grid.width * grid.channels, grid.channels, scratch[1], scratch[2]);
        }
      }
      if (!is_inside) {
        gather(plan, grid, x, tile, channel, channels, scratch[0]);
        to_products(plan, scratch[0], plan.cols.inputs * kBlock, kBlock, scratch[1], scratch[2]);
      }
      T* values = scratch[2];
      if (plan.input_mix.num_rows() > 0) {
        apply<T>(plan.input_mix, {scratch[2], kBlock}, {scratch[0], kBlock});
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
    const int64_t rows = std::min(plan.rows.outputs, grid.out_height - first_row);
    const int64_t columns = std::min(plan.cols.outputs, grid.out_width - first_column);
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
      if (mixed) apply<T>(plan.output_mix, {scratch[1], kBlock}, {scratch[0], kBlock});
      to_outputs(plan, scratch[0], scratch[1], scratch[2]);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          Out* target =
              out + ((image * grid.out_height + first_row + i) * grid.out_width + first_column + j) * out_channels;
          const T* y = scratch[2] + (i * plan.cols.outputs + j) * kBlock;
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
    // Adding 1.5 * 2^23 rounds to the nearest integer, halves to even, and leaves it in the lowest bits. The limits are
    // compared after that, where they are exact.
    constexpr float kRounder = 12582912.0F + 128;
    const float factor = codes.inverse_scale[product], low = codes.low + kRounder, high = codes.high + kRounder;
    for (int64_t c = 0; c < kBlock; ++c) {
      float code = values[c] * factor + kRounder;
      code = code < low ? low : code;
      code = code > high ? high : code;
      target[c] = static_cast<uint8_t>(std::bit_cast<uint32_t>(code));
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
