#include "integer_kernels.h"

#include <cstdlib>
#include <cstring>
#include <iterator>

namespace baseq {

const IntegerKernels* const kIntegerKernels[] = {
#if defined(__x86_64__)
    &kAvx2Kernels,
#elif defined(__aarch64__)
    &kNeonKernels,
#endif
    &kScalarKernels};
const int64_t kNumIntegerKernels = std::size(kIntegerKernels);

int64_t scratch_bytes(const WeightPanels& weights) {
  const int64_t columns = weights.groups * weights.group_columns;
  return 2 * columns * kPanelRows + weights.groups * kPanelRows * int64_t{sizeof(float) + sizeof(int32_t)};
}

const IntegerKernels* find_integer_kernels() {
  const char* wanted = std::getenv("BASEQ_KERNELS");
  for (const IntegerKernels* kernels : kIntegerKernels) {
    const bool named = wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, kernels->name) == 0;
    if (named && kernels->supported()) return kernels;
  }
  return nullptr;
}

}  // namespace baseq
