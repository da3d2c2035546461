#include "baseq/pipeline/activations.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <iterator>

#include "../io/files.h"

namespace baseq {

Tensor ActivationStorage::allocate(at::IntArrayRef sizes) const {
  TORCH_CHECK(std::find(std::begin(kDtypes), std::end(kDtypes), dtype) != std::end(kDtypes), "activations: dtype is ",
              dtype, ", expected one of ", at::ArrayRef(kDtypes));
  if (directory.empty()) return at::empty(sizes, dtype);

  std::string name = (directory / ".baseq-activations-XXXXXX").string();
  const int descriptor = ::mkstemp(name.data());
  if (descriptor < 0) throw_system_error("activations", "create", name, errno);
  // Reserved now: a full disk is an error here and not a signal in the middle of the run.
  const auto num_bytes = static_cast<off_t>(c10::multiply_integers(sizes) * c10::elementSize(dtype));
  const int error = num_bytes > 0 ? ::posix_fallocate(descriptor, 0, num_bytes) : 0;
  ::close(descriptor);
  Tensor result;
  if (error == 0) result = at::from_file(name, /*shared=*/true, c10::multiply_integers(sizes), dtype).view(sizes);
  ::unlink(name.c_str());
  if (error != 0) throw_system_error("activations", "reserve space for", name, error);
  return result;
}

void for_each_batch(const Tensor& stream, const at::TensorOptions& compute,
                    const std::function<void(int64_t, const Tensor&)>& fn, const PassOptions& options) {
  const int64_t batch = std::max<int64_t>(1, options.tokens_per_batch / stream.size(1));
  for (int64_t begin = 0; begin < stream.size(0); begin += batch) {
    options.step();
    fn(begin, stream.narrow(0, begin, std::min(batch, stream.size(0) - begin)).to(compute));
  }
}

void advance(const DecoderLayer& layer, const Tensor& from, const Tensor& to, const RotaryEmbedding& rope,
             const PassOptions& options) {
  const c10::NoGradGuard no_grad;
  const auto forward = [&](int64_t begin, const Tensor& windows) {
    to.narrow(0, begin, windows.size(0)).copy_(layer.forward(windows, rope));
  };
  for_each_batch(from, rope.cos.options(), forward, options);
}

}  // namespace baseq
