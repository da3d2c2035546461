#pragma once

#include <functional>
#include <vector>

#include "baseq/cluster/communicator.h"
#include "parameters.h"

namespace baseq {

/// The mean loss over the windows of a step of the optimizer, each of which one process has. The gradients of every
/// window are taken alone and added along one tree, so they have the same bytes for every number of processes.
/// They are added to the leaves here; the value has a graph only so that its backward() is allowed.
/// @param chosen   numbers of windows, int64
/// @param owner_of the process that has a window
/// @param loss_of  the loss of one window of this process, whose graph may share parts with those of others
Tensor divided_loss(const Communicator& communicator, const std::vector<Parameter>& parameters, const Tensor& chosen,
                    const std::function<int64_t(int64_t window)>& owner_of,
                    const std::function<Tensor(const Tensor& window)>& loss_of);

}  // namespace baseq
