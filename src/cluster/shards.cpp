#include "shards.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "messages.h"

namespace baseq {

Shards::Shards(Communicator communicator, int64_t num_windows, int64_t num_shards)
    : communicator_(std::move(communicator)) {
  TORCH_CHECK(num_shards >= communicator_.size, "cluster: ", communicator_.size, " processes cannot share ", num_shards,
              " shards; expected at most one process for each shard");
  TORCH_CHECK(num_windows >= num_shards, "cluster: ", num_windows, " windows cannot be cut into ", num_shards,
              " shards");
  begins_.clear();
  owners_.clear();
  for (int64_t shard = 0; shard <= num_shards; ++shard) begins_.push_back(shard * num_windows / num_shards);
  for (int64_t rank = 0; rank < communicator_.size; ++rank) {
    const int64_t end = (rank + 1) * num_shards / communicator_.size;
    while (this->num_shards() < end) owners_.push_back(rank);
  }
}

int64_t Shards::shard_of(int64_t window) const {
  const auto after = std::upper_bound(begins_.begin(), begins_.end(), window);
  return std::min<int64_t>(after - begins_.begin() - 1, num_shards() - 1);
}

int64_t Shards::first_window(int64_t rank) const {
  return begins_[static_cast<size_t>(std::lower_bound(owners_.begin(), owners_.end(), rank) - owners_.begin())];
}

int64_t Shards::num_windows(const Tensor& own) const { return communicator_.size == 1 ? own.size(0) : begins_.back(); }

std::vector<int64_t> Shards::pools(const Tensor& windows, int64_t batch_size) const {
  const int64_t num_pools = std::min(batch_size, num_shards());
  std::vector<int64_t> pools;
  for (int64_t i = 0; i < windows.size(0) && num_shards() > 1; ++i) {
    pools.push_back(shard_of(windows[i].item<int64_t>()) * num_pools / num_shards());
  }
  return pools;
}

Tensor Shards::own(const Tensor& all) const {
  if (communicator_.size == 1) return all;
  return all.narrow(0, first_window(), num_windows(communicator_.rank));
}

Tensor Shards::all(const Tensor& own) const {
  if (communicator_.size == 1) return own;
  std::vector<Tensor> parts;
  for (int64_t rank = 0; rank < communicator_.size; ++rank) parts.push_back(broadcast(communicator_, own, rank));
  return at::cat(parts);
}

Tensor Shards::gather(const Tensor& own) const {
  if (communicator_.size == 1) return own;
  if (!communicator_.is_first()) {
    send_tensor(communicator_, 0, own);
    return {};
  }
  std::vector<int64_t> sizes = own.sizes().vec();
  sizes[0] = begins_.back();
  Tensor all = at::empty(sizes, own.options().device(at::kCPU));
  for (int64_t rank = 0; rank < communicator_.size; ++rank) {
    const Tensor part = rank == 0 ? own : receive_tensor(communicator_, rank);
    all.narrow(0, first_window(rank), num_windows(rank)).copy_(part);
  }
  return all;
}

Tensor Shards::scatter(const Tensor& all) const {
  if (communicator_.size == 1) return all;
  if (!communicator_.is_first()) return receive_tensor(communicator_, 0);
  for (int64_t rank = 1; rank < communicator_.size; ++rank) {
    send_tensor(communicator_, rank, all.narrow(0, first_window(rank), num_windows(rank)));
  }
  return own(all);
}

void WindowSum::add(int64_t own_window, const Tensor& term) {
  const int64_t shard = shards_->shard_of_own(own_window);
  if (shard != shard_) {
    end_shard();
    shard_ = shard;
  }
  if (sum_.defined()) {
    combine_(sum_, term);
  } else {
    sum_ = term.to(at::kDouble);
  }
}

Tensor WindowSum::total(bool everywhere) {
  end_shard();
  return sums_.total(everywhere);
}

void WindowSum::end_shard() {
  if (sum_.defined()) sums_.add(shard_, std::move(sum_));
  sum_ = Tensor();
}

}  // namespace baseq
