#pragma once

#include <cmath>

#include "lanes.h"

/// The row functions of rows.h, inlined into a version for each instruction set.
namespace baseq {

/// `fn(values of a register, first index)` over n values; the last ones are padded with zeros.
template <class Isa, class Fn>
[[gnu::always_inline]] inline void for_each_register(int64_t n, const Fn& fn) {
  int64_t i = 0;
  for (; i + Isa::kLanes <= n; i += Isa::kLanes) fn(i, int64_t{Isa::kLanes});
  if (i < n) fn(i, n - i);
}
template <class Isa>
[[gnu::always_inline]] inline typename Isa::Floats load_some(const float* values, int64_t count) {
  if (count == Isa::kLanes) return load<Isa>(values);
  float padded[Isa::kLanes] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = values[i];
  return load<Isa>(padded);
}
template <class Isa>
[[gnu::always_inline]] inline void store_some(float* values, const typename Isa::Floats& lanes, int64_t count) {
  if (count == Isa::kLanes) return store<Isa>(values, lanes);
  float padded[Isa::kLanes];
  store<Isa>(padded, lanes);
  for (int64_t i = 0; i < count; ++i) values[i] = padded[i];
}

template <class Isa>
[[gnu::always_inline]] inline void rms_norm_row(const float* x, const float* weight, float eps, int64_t n, float* y) {
  using Floats = typename Isa::Floats;
  constexpr int kParts = 16 / Isa::kLanes;
  Floats squares[kParts];
  repeat<kParts>([&](auto part) __attribute__((always_inline)) { squares[part] = Floats{}; });
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    repeat<kParts>([&](auto part) __attribute__((always_inline)) {
      const Floats values = load<Isa>(x + i + part * Isa::kLanes);
      Isa::fma(squares[part], values, values);
    });
  }
  if (i < n) {
    float padded[16] = {};
    for (int64_t k = i; k < n; ++k) padded[k - i] = x[k];
    repeat<kParts>([&](auto part) __attribute__((always_inline)) {
      const Floats values = load<Isa>(padded + part * Isa::kLanes);
      Isa::fma(squares[part], values, values);
    });
  }
  const float mean = sum_of_lanes<Isa>(squares) / static_cast<float>(n);
  const float factor = 1.0F / std::sqrt(mean + eps);
  for_each_register<Isa>(
      n, [&](int64_t at, int64_t count) __attribute__((always_inline)) {
        store_some<Isa>(y + at, load_some<Isa>(x + at, count) * factor * load_some<Isa>(weight + at, count), count);
      });
}

template <class Isa>
[[gnu::always_inline]] inline void silu_product_row(const float* gate, const float* up, const float* factor, int64_t n,
                                                    float* y) {
  using Floats = typename Isa::Floats;
  for_each_register<Isa>(
      n, [&](int64_t at, int64_t count) __attribute__((always_inline)) {
        const Floats x = load_some<Isa>(gate + at, count), one = Floats{} + 1.0F;
        const Floats decay = exp_of_negative<Isa>(-magnitude<Isa>(x));
        const Floats above = x < 0.0F ? decay : one;
        Floats result = x * (above / (decay + 1.0F)) * load_some<Isa>(up + at, count);
        if (factor != nullptr) result = result * load_some<Isa>(factor + at, count);
        store_some<Isa>(y + at, result, count);
      });
}

/// One head: `a cos - b sin`, `b cos + a sin` over the two halves.
template <class Isa>
[[gnu::always_inline]] inline void rope_head(float* x, const float* cos, const float* sin, int64_t half) {
  using Floats = typename Isa::Floats;
  for_each_register<Isa>(
      half, [&](int64_t at, int64_t count) __attribute__((always_inline)) {
        const Floats a = load_some<Isa>(x + at, count), b = load_some<Isa>(x + half + at, count);
        const Floats c = load_some<Isa>(cos + at, count), s = load_some<Isa>(sin + at, count);
        store_some<Isa>(x + at, a * c - b * s, count);
        store_some<Isa>(x + half + at, b * c + a * s, count);
      });
}

}  // namespace baseq
