#include "messages.h"

#include <ATen/ATen.h>

#include <array>
#include <vector>

namespace baseq {
namespace {

constexpr size_t kMaxDimensions = 8;

/// What is sent before the values of a tensor.
struct TensorHeader {
  int64_t dtype = 0, dimensions = -1;  ///< -1: the tensor is undefined
  std::array<int64_t, kMaxDimensions> sizes{};
};

/// receive(from) and then send(to, what came) along a tree of pairs: after step k twice as many processes have it.
template <class Receive, class Send>
void pass_on(const Communicator& communicator, int64_t from, const Receive& receive, const Send& send) {
  const int64_t size = communicator.size, place = (communicator.rank - from + size) % size;
  int64_t reach = 1;
  for (; reach <= place; reach *= 2) continue;
  if (place > 0) receive((place - reach / 2 + from) % size);
  for (; place + reach < size; reach *= 2) send((place + reach + from) % size);
}

}  // namespace

void send_tensor(const Communicator& communicator, int64_t to, const Tensor& tensor) {
  TensorHeader header;
  Tensor values;
  if (tensor.defined()) {
    values = tensor.detach().cpu().contiguous();
    TORCH_CHECK(values.dim() <= static_cast<int64_t>(kMaxDimensions), "cluster: a tensor of ", values.sizes(),
                " has too many dimensions to be sent");
    header.dtype = static_cast<int64_t>(values.scalar_type());
    header.dimensions = values.dim();
    for (int64_t d = 0; d < values.dim(); ++d) header.sizes[static_cast<size_t>(d)] = values.size(d);
  }
  communicator.send(to, &header, sizeof(header));
  if (tensor.defined() && values.nbytes() > 0) communicator.send(to, values.const_data_ptr(), values.nbytes());
}

Tensor receive_tensor(const Communicator& communicator, int64_t from) {
  TensorHeader header;
  communicator.receive(from, &header, sizeof(header));
  if (header.dimensions < 0) return {};
  const at::IntArrayRef sizes(header.sizes.data(), static_cast<size_t>(header.dimensions));
  Tensor values = at::empty(sizes, static_cast<at::ScalarType>(header.dtype));
  if (values.nbytes() > 0) communicator.receive(from, values.mutable_data_ptr(), values.nbytes());
  return values;
}

void send_text(const Communicator& communicator, int64_t to, const std::string& text) {
  const uint64_t size = text.size();
  communicator.send(to, &size, sizeof(size));
  if (size > 0) communicator.send(to, text.data(), size);
}

std::string receive_text(const Communicator& communicator, int64_t from) {
  uint64_t size = 0;
  communicator.receive(from, &size, sizeof(size));
  std::string text(size, '\0');
  if (size > 0) communicator.receive(from, text.data(), size);
  return text;
}

Tensor broadcast(const Communicator& communicator, const Tensor& tensor, int64_t from) {
  if (communicator.size == 1) return tensor;
  Tensor result = tensor;
  pass_on(
      communicator, from, [&](int64_t before) { result = receive_tensor(communicator, before); },
      [&](int64_t next) { send_tensor(communicator, next, result); });
  return tensor.defined() && result.defined() ? result.to(tensor.device()) : result;
}

std::string broadcast(const Communicator& communicator, const std::string& text, int64_t from) {
  if (communicator.size == 1) return text;
  std::string result = text;
  pass_on(
      communicator, from, [&](int64_t before) { result = receive_text(communicator, before); },
      [&](int64_t next) { send_text(communicator, next, result); });
  return result;
}

std::map<std::string, Tensor> broadcast(const Communicator& communicator, const std::map<std::string, Tensor>& tensors,
                                        int64_t from) {
  if (communicator.size == 1) return tensors;
  std::string names;
  for (const auto& [name, tensor] : tensors) names += name + '\n';
  names = broadcast(communicator, names, from);
  std::map<std::string, Tensor> result;
  for (size_t begin = 0; begin < names.size();) {
    const size_t end = names.find('\n', begin);
    const std::string name = names.substr(begin, end - begin);
    const auto given = communicator.rank == from ? tensors.find(name) : tensors.end();
    result[name] = broadcast(communicator, given == tensors.end() ? Tensor() : given->second, from);
    begin = end + 1;
  }
  return result;
}

}  // namespace baseq
