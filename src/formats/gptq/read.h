#pragma once

#include "baseq/model/stored_model.h"

/// Checkpoints of GPTQ and AWQ. Not installed.
namespace baseq {

/// Whether config.json or quantize_config.json says that `checkpoint` is in one of the two formats.
bool is_gptq_or_awq(const Checkpoint& checkpoint);

/// Linears become int8 codes, scales [out_features, groups] and, unless all are in the middle, zero points. The index
/// of groups that GPTQ writes with desc_act becomes `weight_g_idx`. Formats: GPTQ v1 and v2 of 2, 3, 4 and 8 bits, AWQ
/// "gemm". Throws naming what is not supported.
StoredModel read_gptq(const Checkpoint& checkpoint);

}  // namespace baseq
