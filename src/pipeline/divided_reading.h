#pragma once

#include "baseq/cluster/communicator.h"
#include "baseq/model/stored_model.h"

namespace baseq {

/// The same model for several processes: each reads its share of a block's tensors and sends it to the others. All have
/// to ask for the same tensors of blocks in the same order. What surrounds the blocks each reads itself.
StoredModel read_together(StoredModel stored, const Communicator& communicator);

}  // namespace baseq
