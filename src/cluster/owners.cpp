#include "owners.h"

#include <algorithm>
#include <numeric>

namespace baseq {

std::vector<int64_t> owners_by_work(const std::vector<int64_t>& work, int64_t num_processes) {
  std::vector<size_t> order(work.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::ranges::stable_sort(order, [&](size_t a, size_t b) { return work[a] > work[b]; });
  std::vector<int64_t> loads(static_cast<size_t>(num_processes)), owners(work.size());
  for (const size_t part : order) {
    const auto least = std::ranges::min_element(loads);
    *least += work[part];
    owners[part] = least - loads.begin();
  }
  return owners;
}

}  // namespace baseq
