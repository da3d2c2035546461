// libFuzzer's entry, see docs/fuzzing.md. The name of the program chooses the target: fuzz_<target>.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "targets.h"

namespace {
const baseq::fuzz::Target* target = nullptr;
}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char*** arguments) {
  const std::string program = std::filesystem::path((*arguments)[0]).filename();
  for (const baseq::fuzz::Target& each : baseq::fuzz::kTargets) {
    if (program == std::string("fuzz_") + each.name) target = &each;
  }
  if (target == nullptr) {
    std::fprintf(stderr, "%s: no target has this name\n", program.c_str());
    std::exit(2);
  }
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  baseq::fuzz::run(*target, {reinterpret_cast<const char*>(data), size});
  return 0;
}
