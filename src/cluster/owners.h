#pragma once

#include <cstdint>
#include <vector>

namespace baseq {

/// The process that does each part of a work: the largest part goes to the first one, each smaller one to the process
/// that has least to do.
/// @param work of each part, in any unit
std::vector<int64_t> owners_by_work(const std::vector<int64_t>& work, int64_t num_processes);

}  // namespace baseq
