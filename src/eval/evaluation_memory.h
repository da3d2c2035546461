#pragma once

#include "baseq/model/config.h"
#include "baseq/pipeline/job.h"

/// Not installed.
namespace baseq {

/// Memory that evaluate needs at its peak, as estimated.
Footprint evaluation_memory(const ModelConfig& config, int64_t num_windows, int64_t seq_len, bool with_reference,
                            bool activations_on_disk);

}  // namespace baseq
