#include "instruction_set.h"

#include <ATen/Version.h>

#ifdef __x86_64__
#include <cpuid.h>
#endif

namespace baseq {
namespace {

struct Extensions {
  bool avx2 = false, fma = false, avx512f = false, avx512_vnni = false, avx512_bf16 = false, avx512_fp16 = false,
       amx_bf16 = false;
};

Extensions extensions() {
  Extensions found;
#ifdef __x86_64__
  found.avx2 = __builtin_cpu_supports("avx2") != 0;
  found.fma = __builtin_cpu_supports("fma") != 0;
  found.avx512f = __builtin_cpu_supports("avx512f") != 0;
  if (!found.avx512f) return found;
  found.avx512_vnni = __builtin_cpu_supports("avx512vnni") != 0;
  // Compilers differ in the names of these.
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) != 0) {
    found.amx_bf16 = (d >> 22 & 1) != 0;
    found.avx512_fp16 = (d >> 23 & 1) != 0;
  }
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d) != 0) found.avx512_bf16 = (a >> 5 & 1) != 0;
#endif
  return found;
}

}  // namespace

std::string instruction_set() {
  const Extensions found = extensions();
  std::string names;
  const auto add = [&](bool there, const char* name) {
    if (there) names += (names.empty() ? "" : " ") + std::string(name);
  };
  add(found.avx2, "avx2");
  add(found.fma, "fma");
  add(found.avx512f, "avx512f");
  add(found.avx512_vnni, "avx512_vnni");
  add(found.avx512_bf16, "avx512_bf16");
  add(found.avx512_fp16, "avx512_fp16");
  add(found.amx_bf16, "amx_bf16");
  return at::get_cpu_capability() + (names.empty() ? "" : " (" + names + ")");
}

bool multiplies([[maybe_unused]] at::ScalarType dtype) {
#ifdef __x86_64__
  const Extensions found = extensions();
  if (dtype == at::kBFloat16) return found.avx512_bf16 || found.amx_bf16;
  if (dtype == at::kHalf) return found.avx512_fp16;
#endif
  return true;
}

}  // namespace baseq
