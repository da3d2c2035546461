#pragma once

#include <limits>
#include <vector>

#include "baseq/cluster/communicator.h"
#include "tree_sum.h"

namespace baseq {

/// Which of the windows of a run this process has. The windows are cut into shards, whose number belongs to the run and
/// not to the processes; a process has some shards in a row. No batch of a pass reaches over the end of a shard, and
/// sums over windows are added shard by shard along one tree: nothing depends on which process has which shard.
///
/// In tensors of a process its windows count from 0, in those of all windows from 0 as well.
class Shards {
 public:
  /// One process that has all windows, however many, in one shard.
  Shards() = default;
  /// Of several processes where there are no windows.
  explicit Shards(Communicator communicator) : communicator_(std::move(communicator)) {}
  /// Throws c10::Error when there are fewer windows than shards, or fewer shards than processes.
  Shards(Communicator communicator, int64_t num_windows, int64_t num_shards);

  const Communicator& communicator() const { return communicator_; }
  int64_t num_shards() const { return static_cast<int64_t>(owners_.size()); }
  /// The process that has each shard.
  const std::vector<int64_t>& owners() const { return owners_; }

  /// Of all processes, of whose windows `own` [windows, ...] are those of this one.
  int64_t num_windows(const Tensor& own) const;
  int64_t num_own_windows() const { return num_windows(communicator_.rank); }
  /// The first window of this process among all.
  int64_t first_window() const { return first_window(communicator_.rank); }
  /// The shard of a window, of all of them, and the process that has it.
  int64_t shard_of(int64_t window) const;
  int64_t owner_of(int64_t window) const { return owners_[static_cast<size_t>(shard_of(window))]; }
  /// The shard of a window of this process.
  int64_t shard_of_own(int64_t own_window) const { return shard_of(first_window() + own_window); }
  /// Where the shard of a window of this process ends, counted as that.
  int64_t end_of_shard(int64_t own_window) const {
    return begins_[static_cast<size_t>(shard_of_own(own_window)) + 1] - first_window();
  }

  /// Windows in as many pools as one batch has windows of different processes: batches that take one of each pool in
  /// turn leave no process without work. Empty: there is one shard.
  /// @param windows their numbers, int64
  std::vector<int64_t> pools(const Tensor& windows, int64_t batch_size) const;

  /// The part of this process of a tensor [num_windows, ...].
  Tensor own(const Tensor& all) const;
  /// The inverse: [num_windows, ...] of the parts of all processes, which all call it.
  Tensor all(const Tensor& own) const;
  /// The same for the first process alone; undefined for the others.
  Tensor gather(const Tensor& own) const;
  /// The part of this process of what the first one gives.
  Tensor scatter(const Tensor& all) const;

 private:
  int64_t first_window(int64_t rank) const;
  int64_t num_windows(int64_t rank) const { return first_window(rank + 1) - first_window(rank); }

  Communicator communicator_;
  std::vector<int64_t> begins_{0, std::numeric_limits<int64_t>::max()};  ///< of the shards, and where the last one ends
  std::vector<int64_t> owners_{0};
};

/// A sum over the windows of a run, float64: within a shard in the order in which terms are added, then along the tree
/// of the shards.
class WindowSum {
 public:
  /// `shards` must outlive this.
  explicit WindowSum(const Shards& shards, TreeSum::Combine combine = TreeSum::add_terms)
      : shards_(&shards), combine_(combine), sums_(shards.communicator(), shards.owners(), combine) {}

  /// @param own_window the first one of this process that the term is of; windows come in rising order
  void add(int64_t own_window, const Tensor& term);
  /// All processes call it once; undefined where none added a term.
  /// @param everywhere false: for the first process alone, undefined for the others
  Tensor total(bool everywhere = true);

 private:
  void end_shard();

  const Shards* shards_;
  TreeSum::Combine combine_;
  TreeSum sums_;
  int64_t shard_ = -1;
  Tensor sum_;  ///< of that shard
};

}  // namespace baseq
