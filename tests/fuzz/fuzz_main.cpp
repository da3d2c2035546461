// libFuzzer's entry for the target BASEQ_FUZZ_TARGET, see docs/fuzzing.md.
#include <cstddef>
#include <cstdint>

#include "targets.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static constexpr baseq::fuzz::Target kTarget{"", baseq::fuzz::BASEQ_FUZZ_TARGET};
  baseq::fuzz::run(kTarget, {reinterpret_cast<const char*>(data), size});
  return 0;
}
