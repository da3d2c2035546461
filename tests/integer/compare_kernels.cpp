/// Compares the kernels of this processor with the scalar ones, bit by bit, without LibTorch: what
/// scripts/check_aarch64.sh runs in an emulator.
///
///     compare_kernels [CASES]

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "random_panels.h"

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 1000;
  int compared = 0;
  for (int64_t set = 0; set < baseq::kNumIntegerKernels; ++set) {
    const baseq::IntegerKernels& kernels = *baseq::kIntegerKernels[set];
    if (!kernels.supported() || std::strcmp(kernels.name, "scalar") == 0) continue;
    std::mt19937_64 random(1);
    for (int i = 0; i < cases; ++i) {
      const baseq::PanelShape shape = baseq::random_shape(random);
      const baseq::RandomPanels operands(shape, i);
      const std::vector<float> expected = operands.multiply(baseq::kScalarKernels), y = operands.multiply(kernels);
      if (std::memcmp(y.data(), expected.data(), y.size() * sizeof(float)) != 0) {
        std::printf("compare_kernels: %s differs from scalar in case %d: %d bits, %d rows, %d planes, codes to %d\n",
                    kernels.name, i, static_cast<int>(shape.num_bits), static_cast<int>(shape.rows),
                    static_cast<int>(shape.planes), static_cast<int>(shape.max_code));
        return 1;
      }
      ++compared;
    }
    std::printf("%s: equal to scalar in %d cases\n", kernels.name, cases);
  }
  if (compared == 0) std::printf("compare_kernels: no kernels but the scalar ones run on this processor\n");
  return compared > 0 ? 0 : 1;
}
