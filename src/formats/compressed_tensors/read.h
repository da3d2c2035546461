#pragma once

#include "baseq/model/stored_model.h"

namespace baseq {

/// Whether config.json says that `checkpoint` is of compressed-tensors. Not installed.
bool is_compressed_tensors(const Checkpoint& checkpoint);

/// Throws c10::Error naming what this program does not execute.
StoredModel read_compressed_tensors(Checkpoint checkpoint);

}  // namespace baseq
