#pragma once

#include <cstdint>

#include "tiles.h"

/// The transform along one axis of a tile, for kChannelBlock neighbouring channels at a time.
namespace baseq {

constexpr int64_t kLanes = 16, kBlock = kChannelBlock, kSets = kBlock / kLanes;
template <class T>
using Lanes __attribute__((vector_size(kLanes * sizeof(T)), aligned(sizeof(T)), may_alias)) = T;

/// Vectors of a block, `stride` elements apart.
template <class T>
struct Vectors {
  T* data;
  int64_t stride;

  [[gnu::always_inline]] const Lanes<T>& operator()(int64_t i, int64_t set) const {
    return *reinterpret_cast<const Lanes<T>*>(data + i * stride + set * kLanes);
  }
  [[gnu::always_inline]] void put(int64_t i, int64_t set, const Lanes<T>& value) const {
    *reinterpret_cast<Lanes<T>*>(data + i * stride + set * kLanes) = value;
  }
  [[gnu::always_inline]] Vectors from(int64_t i) const { return {data + i * stride, stride}; }
};

/// out[row] = sum over a row's entries of value * in[column].
template <class T>
[[gnu::always_inline]] inline void apply(const SparseRows& matrix, Vectors<T> in, Vectors<T> out) {
  const int64_t rows = matrix.num_rows();
  const int32_t *begin = matrix.begin.data(), *column = matrix.column.data(), *value = matrix.value.data();
  for (int64_t row = 0; row < rows; ++row) {
    Lanes<T> sums[kSets] = {};
    for (int32_t i = begin[row]; i < begin[row + 1]; ++i) {
      const T factor = static_cast<T>(value[i]);
      for (int64_t s = 0; s < kSets; ++s) sums[s] += in(column[i], s) * factor;
    }
    for (int64_t s = 0; s < kSets; ++s) out.put(row, s, sums[s]);
  }
}

// The circles below are the first rows of sfc_algorithm's matrices with what their rows share computed once.

template <class T>
[[gnu::always_inline]] inline void circle_of_six(Vectors<T> x, Vectors<T> out) {
  for (int64_t s = 0; s < kSets; ++s) {
    const Lanes<T> a0 = x(0, s) + x(3, s), a1 = x(1, s) + x(4, s), a2 = x(2, s) + x(5, s);
    const Lanes<T> b0 = x(0, s) - x(3, s), b1 = x(1, s) - x(4, s), b2 = x(2, s) - x(5, s);
    out.put(0, s, a0 + a1 + a2);
    out.put(1, s, b0 + b1);
    out.put(2, s, -b1 - b2);
    out.put(3, s, b0 - b2);
    out.put(4, s, a0 - a2);
    out.put(5, s, a2 - a1);
    out.put(6, s, a0 - a1);
    out.put(7, s, b0 - b1 + b2);
  }
}

template <class T>
[[gnu::always_inline]] inline void circle_of_four(Vectors<T> x, Vectors<T> out) {
  for (int64_t s = 0; s < kSets; ++s) {
    const Lanes<T> a0 = x(0, s) + x(2, s), a1 = x(1, s) + x(3, s);
    const Lanes<T> b0 = x(0, s) - x(2, s), b1 = x(3, s) - x(1, s);
    out.put(0, s, a0 + a1);
    out.put(1, s, b0);
    out.put(2, s, b1);
    out.put(3, s, b0 + b1);
    out.put(4, s, a0 - a1);
  }
}

/// Six times the circular correlation, from its eight products.
template <class T>
[[gnu::always_inline]] inline void circle_back_to_six(Vectors<T> m, Vectors<T> out) {
  for (int64_t s = 0; s < kSets; ++s) {
    const T three = 3;
    const Lanes<T> even = m(0, s) + m(4, s) + m(5, s) + m(6, s), odd = m(1, s) + m(2, s) + m(3, s) + m(7, s);
    const Lanes<T> e0 = even - m(5, s) * three, e1 = even - m(6, s) * three, e2 = even - m(4, s) * three;
    const Lanes<T> o0 = odd - m(2, s) * three, o1 = m(1, s) * three - odd, o2 = odd - m(3, s) * three;
    out.put(0, s, e0 + o0);
    out.put(1, s, e1 + o1);
    out.put(2, s, e2 + o2);
    out.put(3, s, e0 - o0);
    out.put(4, s, e1 - o1);
    out.put(5, s, e2 - o2);
  }
}

/// Four times the circular correlation, from its five products.
template <class T>
[[gnu::always_inline]] inline void circle_back_to_four(Vectors<T> m, Vectors<T> out) {
  for (int64_t s = 0; s < kSets; ++s) {
    const T two = 2;
    const Lanes<T> u = (m(1, s) - m(2, s)) * two, v = (m(3, s) - m(1, s) - m(2, s)) * two;
    const Lanes<T> sum = m(0, s) + m(4, s), difference = m(0, s) - m(4, s);
    out.put(0, s, sum + u);
    out.put(1, s, difference - v);
    out.put(2, s, sum - u);
    out.put(3, s, difference + v);
  }
}

/// B^T x along one axis.
template <class T>
[[gnu::always_inline]] inline void to_products(const AxisPlan& axis, Vectors<T> x, Vectors<T> out) {
  if (axis.circle == 6) circle_of_six(x.from(axis.window), out);
  if (axis.circle == 4) circle_of_four(x.from(axis.window), out);
  apply(axis.input, x, out.from(axis.circle_products));
}

/// divisor A^T m along one axis.
template <class T>
[[gnu::always_inline]] inline void to_outputs(const AxisPlan& axis, Vectors<T> m, Vectors<T> out) {
  if (axis.circle == 0) {
    apply(axis.output, m, out);
    return;
  }
  T memory[6 * kBlock];
  const Vectors<T> circle{memory, kBlock};
  if (axis.circle == 6) circle_back_to_six(m, circle);
  if (axis.circle == 4) circle_back_to_four(m, circle);
  const int32_t *begin = axis.output.begin.data(), *column = axis.output.column.data();
  const T factor = static_cast<T>(axis.circle);  // of every product outside the circle
  for (int64_t k = 0; k < axis.outputs; ++k) {
    for (int64_t s = 0; s < kSets; ++s) {
      Lanes<T> sum = circle(axis.place[k], s);
      for (int32_t i = begin[k]; i < begin[k + 1]; ++i) sum += m(column[i], s) * factor;
      out.put(k, s, sum);
    }
  }
}

}  // namespace baseq
