#pragma once

#include "block_quantizer.h"
#include "cluster/shards.h"
#include "device_plan.h"
#include "output_tables.h"

namespace baseq {

/// Throws c10::Error for what a run cannot begin with: a recipe that is not valid, windows of another shape or type.
void check_input(const Job& job);

/// What a job works with.
struct RunParts {
  /// Throws c10::Error for a model that is quantized already, and windows that are missing or that it cannot embed.
  /// @param options all but `seed`, `compute` and `storage`, which are the job's
  RunParts(const Job& job, BlockQuantizer::Options options);
  RunParts(const RunParts&) = delete;
  RunParts& operator=(const RunParts&) = delete;

  /// Puts the streams before the first block, see BlockQuantizer::start().
  void start_blocks(const VocabularyTable& embedding) {
    blocks.start([&](const Tensor& ids) { return embedding.rows(ids); });
  }
  /// Takes the state of the model through a pass over the model.
  void learn_model(int64_t pass, ModelState& state) {
    blocks.learn_model(pass, state, [this](at::ScalarType products) { return tables.heads(products); });
  }

  Shards shards;
  Recipe recipe;       ///< with the grids of this model
  StoredModel stored;  ///< as this process sees it
  Model model;
  at::ScalarType dtype;  ///< of what stays unquantized
  DevicePlan device;
  BlockQuantizer blocks;
  OutputTables tables;
};

}  // namespace baseq
