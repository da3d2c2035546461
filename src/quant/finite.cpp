#include "finite.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace baseq {
namespace {

/// A value is NaN or infinite when every bit of its exponent is set.
template <class Bits>
bool none_has_all_of(Bits exponent, const void* data, int64_t count) {
  constexpr int64_t kBlock = 1 << 14;  // values between two looks at what was found
  const auto* bits = static_cast<const Bits*>(data);
  std::atomic<bool> found = false;
  at::parallel_for(0, count, 16 * kBlock, [&](int64_t begin, int64_t end) {
    for (; begin < end && !found; begin += kBlock) {
      const int64_t stop = std::min(begin + kBlock, end);
      Bits here = 0;
      for (int64_t i = begin; i < stop; ++i) here |= static_cast<Bits>((bits[i] & exponent) == exponent);
      if (here != 0) found = true;
    }
  });
  return !found;
}

}  // namespace

bool all_finite(const Tensor& tensor) {
  if (tensor.device().is_cpu() && tensor.is_contiguous()) {
    const void* data = tensor.const_data_ptr();
    const int64_t count = tensor.numel();
    switch (tensor.scalar_type()) {
      case at::kDouble:
        return none_has_all_of<uint64_t>(0x7FF0'0000'0000'0000, data, count);
      case at::kFloat:
        return none_has_all_of<uint32_t>(0x7F80'0000, data, count);
      case at::kHalf:
        return none_has_all_of<uint16_t>(0x7C00, data, count);
      case at::kBFloat16:
        return none_has_all_of<uint16_t>(0x7F80, data, count);
      default:
        break;
    }
  }
  return tensor.isfinite().all().item<bool>();
}

}  // namespace baseq
