#pragma once

#include <map>
#include <utility>
#include <vector>

#include "baseq/cluster/communicator.h"
#include "baseq/tensor.h"

namespace baseq {

/// A sum of numbered terms along one tree: pairs of neighbours, pairs of those pairs, and so on. The shape of the tree
/// depends on the number of terms alone, so the sum has the same bytes whichever process has which term. A process adds
/// what it has all of, and sends only that.
class TreeSum {
 public:
  /// Changes `left` to `left + right`, or to what else is wanted of pairs.
  using Combine = void (*)(Tensor& left, const Tensor& right);
  static void add_terms(Tensor& left, const Tensor& right);
  static void take_larger(Tensor& left, const Tensor& right);

  /// `communicator` must outlive this.
  /// @param owners of the terms, by number
  TreeSum(const Communicator& communicator, std::vector<int64_t> owners, Combine combine = add_terms);

  /// Takes a term of this process, which may be undefined: then nothing is added. Terms in rising order need the memory
  /// of log2(number of terms) sums at most.
  void add(int64_t number, Tensor term);
  /// The sum; undefined where all terms are. To be called by all processes, once.
  /// @param everywhere false: for the process of the first term alone, undefined for the others
  Tensor total(bool everywhere = true);

 private:
  using Node = std::pair<int, int64_t>;  ///< height and place: terms [place << height, (place + 1) << height)

  Tensor sum_of(Node node);

  const Communicator& communicator_;
  std::vector<int64_t> owners_;
  Combine combine_;
  std::map<Node, Tensor> sums_;  ///< that this process knows and that are no part of another one
};

}  // namespace baseq
