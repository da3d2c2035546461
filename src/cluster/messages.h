#pragma once

#include <map>
#include <string>

#include "baseq/cluster/communicator.h"
#include "baseq/tensor.h"

namespace baseq {

/// Also of an undefined tensor. What is received is on the CPU.
void send_tensor(const Communicator& communicator, int64_t to, const Tensor& tensor);
Tensor receive_tensor(const Communicator& communicator, int64_t from);
void send_text(const Communicator& communicator, int64_t to, const std::string& text);
std::string receive_text(const Communicator& communicator, int64_t from);

// To be called by all processes: returns what `from` gave, along a tree of messages. Of one process alone that is what
// it gave itself.

/// On the device of what was given, where that is defined.
Tensor broadcast(const Communicator& communicator, const Tensor& tensor, int64_t from = 0);
std::string broadcast(const Communicator& communicator, const std::string& text, int64_t from = 0);
std::map<std::string, Tensor> broadcast(const Communicator& communicator, const std::map<std::string, Tensor>& tensors,
                                        int64_t from = 0);

}  // namespace baseq
