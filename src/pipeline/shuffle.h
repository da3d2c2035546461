#pragma once

#include <cstddef>
#include <random>
#include <utility>
#include <vector>

namespace baseq {

/// Fisher-Yates on the generator's own numbers: std::shuffle differs between standard libraries.
template <class T>
void shuffle(std::vector<T>& order, std::mt19937_64& random) {
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);
}

}  // namespace baseq
