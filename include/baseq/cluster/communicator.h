#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#pragma GCC visibility push(default)
namespace baseq {

/// One of several processes that do one job together, and how it reaches the others. Every process is given the same
/// job and a communicator of its own; any transport will do:
///
///     job.options.communicator = {.rank = rank, .size = size, .send = send_bytes, .receive = receive_bytes};
///     quantize(job);
///
/// Messages between two processes arrive in the order in which they were sent.
struct Communicator {
  int64_t rank = 0;  ///< from 0; the first one writes what the job makes and tells of its progress
  int64_t size = 1;  ///< number of processes
  /// May return before the message is there. Throws when the other process has ended, naming it.
  std::function<void(int64_t to, const void* data, size_t num_bytes)> send{};
  /// Waits for a message of that size. Throws when the other process has ended, naming it.
  std::function<void(int64_t from, void* data, size_t num_bytes)> receive{};

  bool is_first() const { return rank == 0; }
};

}  // namespace baseq
#pragma GCC visibility pop
