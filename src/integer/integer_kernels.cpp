#include "integer_kernels.h"

#include <cstdlib>
#include <cstring>
#include <iterator>

#include "panel_arithmetic.h"

namespace baseq {

const IntegerKernels* const kIntegerKernels[] = {
#if defined(__x86_64__)
#if !defined(__clang__)
    &kAvx512PairsKernels, &kAvx512Kernels, &kAvxVnniKernels,
#endif
    &kAvx2Kernels,
#elif defined(__aarch64__)
    &kNeonKernels,
#endif
    &kScalarKernels};
const int64_t kNumIntegerKernels = std::size(kIntegerKernels);

int64_t scratch_bytes(const WeightPanels& weights, const CodeRows& x) {
  const int64_t columns = weights.groups * weights.group_columns;
  const int64_t block = code_rows_of_block(columns, x.rows * x.planes);
  // Two panels unpacked, three numbers for each of their groups and rows; a block of codes with its offsets.
  return 2 * columns * kPanelRows + 2 * weights.groups * kPanelRows * 3 * int64_t{sizeof(int32_t)} +
         block * (columns + weights.groups * int64_t{sizeof(int32_t)});
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
