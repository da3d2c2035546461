#include "pipeline/activations.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <iterator>

#include "../io/files.h"
#include "../quant/matmul_precision.h"
#include "cluster/messages.h"

namespace baseq {

Tensor ActivationStorage::allocate(at::IntArrayRef sizes) const {
  TORCH_CHECK(std::find(std::begin(kDtypes), std::end(kDtypes), dtype) != std::end(kDtypes), "activations: dtype is ",
              dtype, ", expected one of ", at::ArrayRef(kDtypes));
  if (directory.empty()) return at::empty(sizes, at::TensorOptions(dtype).device(device));

  const auto num_bytes = static_cast<size_t>(c10::multiply_integers(sizes)) * c10::elementSize(dtype);
  if (num_bytes == 0) return at::empty(sizes, dtype);
  std::string name = (directory / ".baseq-activations-XXXXXX").string();
  const int descriptor = ::mkostemp(name.data(), O_CLOEXEC);
  if (descriptor < 0) throw_system_error("activations", "create", name, errno);
  const FileDescriptor file(descriptor);
  // Without a name from the start: however the process ends, nothing of it stays.
  ::unlink(name.c_str());
  // Reserved now: a full disk is an error here and not a signal in the middle of the run.
  const int error = ::posix_fallocate(descriptor, 0, static_cast<off_t>(num_bytes));
  if (error != 0) throw_system_error("activations", "reserve space for", name, error);
  void* address = ::mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  if (address == MAP_FAILED) throw_system_error("activations", "map", name, errno);
  return at::from_blob(
      address, sizes, [num_bytes](void* data) { ::munmap(data, num_bytes); }, dtype);
}

Tensor first_windows(const Tensor& stream, const Shards& shards, int64_t tokens) {
  const int64_t most = std::min(stream.size(0), shards.end_of_shard(0));
  const Tensor own = stream.narrow(0, 0, std::clamp<int64_t>(tokens / stream.size(1), 1, most));
  return broadcast(shards.communicator(), own);
}

void for_each_batch(const Tensor& stream, const at::TensorOptions& compute,
                    const std::function<void(int64_t, const Tensor&)>& fn, const PassOptions& options) {
  const MatmulPrecisionScope precision(options.matmul_precision, compute.device());
  const int64_t batch = std::max<int64_t>(1, options.tokens_per_batch / stream.size(1));
  for (int64_t begin = 0, end = 0; begin < stream.size(0); begin = end) {
    options.step();
    end = std::min({begin + batch, stream.size(0), options.shards.end_of_shard(begin)});
    fn(begin, stream.narrow(0, begin, end - begin).to(compute));
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
