#pragma once

#include <vector>

#include "baseq/pipeline/job.h"

namespace baseq {

/// What a run does in one piece: one block in one pass, or a pass over the whole model.
struct Turn {
  int64_t pass = 0;
  int64_t block = 0;  ///< or kWholeModel
};

/// The passes of a run: those of the recipe, and where the last of them is over the model one more without steps, in
/// which the blocks are written.
inline std::vector<Pass> passes_with_blocks_last(std::vector<Pass> passes) {
  if (passes.back().over == Pass::Over::kModel) passes.emplace_back();
  return passes;
}

/// The turns of a run in order.
class Turns {
 public:
  /// @param passes the last one is over blocks
  Turns(const std::vector<Pass>& passes, int64_t num_blocks) {
    for (size_t pass = 0; pass < passes.size(); ++pass) {
      const bool whole = passes[pass].over == Pass::Over::kModel;
      for (int64_t block = whole ? kWholeModel : 0; block < (whole ? 0 : num_blocks); ++block) {
        turns_.push_back({static_cast<int64_t>(pass), block});
      }
    }
  }

  int64_t size() const { return static_cast<int64_t>(turns_.size()); }
  const Turn& operator[](int64_t index) const { return turns_.at(static_cast<size_t>(index)); }
  /// Also of the number of all turns, which would start another pass.
  bool starts_pass(int64_t index) const {
    return index == 0 || index == size() || (*this)[index].pass != (*this)[index - 1].pass;
  }
  bool in_last_pass(int64_t index) const { return (*this)[index].pass == turns_.back().pass; }
  /// The first turn of the same pass.
  int64_t first_of_pass(int64_t index) const {
    while (!starts_pass(index)) --index;
    return index;
  }

 private:
  std::vector<Turn> turns_;
};

}  // namespace baseq
