#pragma once

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "baseq/cluster/communicator.h"

namespace baseq::test {

/// Threads in the place of processes.
class ThreadCluster {
 public:
  explicit ThreadCluster(int64_t size) : size_(size) {}

  /// work(communicator) in a thread for each process, with one thread of LibTorch. When one of them throws, the others
  /// are told that it has ended; then the first exception is thrown.
  void run(const std::function<void(const Communicator&)>& work) {
    std::vector<std::thread> threads;
    for (int64_t rank = 0; rank < size_; ++rank) {
      threads.emplace_back([this, rank, &work] {
        at::set_num_threads(1);
        try {
          work(communicator(rank));
        } catch (...) {
          end(rank, std::current_exception());
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    if (error_) std::rethrow_exception(error_);
  }

  int64_t bytes_sent() const { return bytes_sent_; }
  /// What each process ended with, "" if it did not throw.
  const std::map<int64_t, std::string>& messages() const { return messages_; }

 private:
  Communicator communicator(int64_t rank) {
    return {.rank = rank,
            .size = size_,
            .send =
                [this, rank](int64_t to, const void* data, size_t num_bytes) {
                  const std::lock_guard lock(mutex_);
                  mail_[{rank, to}].emplace_back(static_cast<const char*>(data), num_bytes);
                  bytes_sent_ += static_cast<int64_t>(num_bytes);
                  arrived_.notify_all();
                },
            .receive =
                [this, rank](int64_t from, void* data, size_t num_bytes) {
                  std::unique_lock lock(mutex_);
                  std::deque<std::string>& mail = mail_[{from, rank}];
                  arrived_.wait(lock, [&] { return !mail.empty() || error_; });
                  TORCH_CHECK(!mail.empty(), "process ", ended_, " has ended");
                  TORCH_CHECK(mail.front().size() == num_bytes, "process ", rank, " expected ", num_bytes,
                              " bytes of process ", from, " and got ", mail.front().size());
                  std::memcpy(data, mail.front().data(), num_bytes);
                  mail.pop_front();
                }};
  }

  void end(int64_t rank, std::exception_ptr error) {
    const std::lock_guard lock(mutex_);
    try {
      std::rethrow_exception(error);
    } catch (const std::exception& exception) {
      messages_[rank] = exception.what();
    }
    if (!error_) {
      error_ = error;
      ended_ = rank;
    }
    arrived_.notify_all();
  }

  int64_t size_, ended_ = -1, bytes_sent_ = 0;
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::map<std::pair<int64_t, int64_t>, std::deque<std::string>> mail_;  ///< by sender and receiver
  std::exception_ptr error_;
  std::map<int64_t, std::string> messages_;
};

}  // namespace baseq::test
