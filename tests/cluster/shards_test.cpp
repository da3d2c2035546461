#include "cluster/shards.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "../random_tensors.h"
#include "cluster/messages.h"
#include "cluster/owners.h"
#include "thread_cluster.h"

namespace baseq {
namespace {

using test::random_normal;
using test::ThreadCluster;

/// Numbers of all magnitudes: every order of additions has other last bits.
Tensor rough_terms(int64_t count, at::IntArrayRef sizes, uint64_t seed) {
  std::vector<int64_t> shape{count};
  shape.insert(shape.end(), sizes.begin(), sizes.end());
  return random_normal(shape, seed) * (8 * random_normal(shape, seed + 1)).exp();
}

Tensor sum_of(const Tensor& windows, const Shards& shards, bool everywhere = true) {
  WindowSum sum(shards);
  const Tensor own = shards.own(windows);
  for (int64_t i = 0; i < own.size(0); ++i) sum.add(i, own[i].clone());
  return sum.total(everywhere);
}

TEST(Shards, EveryNumberOfProcessesMakesTheSameSum) {
  for (const int64_t num_shards : {1, 2, 4, 8, 16}) {
    for (const int64_t num_windows : {num_shards, 2 * num_shards, 3 * num_shards + num_shards / 2 + 1}) {
      const Tensor windows = rough_terms(num_windows, {5, 3}, static_cast<uint64_t>(num_windows));
      const Tensor alone = sum_of(windows, Shards({}, num_windows, num_shards));
      EXPECT_TRUE(at::allclose(alone, windows.sum(0)));
      for (int64_t size = 1; size <= num_shards; ++size) {
        SCOPED_TRACE(testing::Message() << num_windows << " windows, " << num_shards << " shards, " << size);
        ThreadCluster(size).run([&](const Communicator& communicator) {
          const Shards shards(communicator, num_windows, num_shards);
          EXPECT_TRUE(at::equal(sum_of(windows, shards), alone)) << "process " << communicator.rank;
          const Tensor of_first = sum_of(windows, shards, /*everywhere=*/false);
          EXPECT_EQ(of_first.defined(), communicator.is_first());
          EXPECT_TRUE(!of_first.defined() || at::equal(of_first, alone));
        });
      }
    }
  }
}

TEST(Owners, TheLargestPartsGoFirstToWhoHasLeast) {
  EXPECT_EQ(owners_by_work({1, 8, 3, 3, 4}, 2), (std::vector<int64_t>{0, 0, 1, 1, 1}));
  EXPECT_EQ(owners_by_work({5, 5}, 4), (std::vector<int64_t>{0, 1}));
  EXPECT_EQ(owners_by_work({1, 2, 3}, 1), (std::vector<int64_t>{0, 0, 0}));
}

TEST(Shards, AnotherNumberOfShardsIsAnotherOrder) {
  const Tensor windows = rough_terms(64, {50}, 5);
  EXPECT_FALSE(at::equal(sum_of(windows, Shards({}, 64, 1)), sum_of(windows, Shards({}, 64, 8))));
}

TEST(Shards, OneShardIsAChain) {
  const Tensor windows = rough_terms(9, {50}, 6);
  Tensor chain = windows[0].clone();
  for (int64_t i = 1; i < 9; ++i) chain.add_(windows[i]);
  EXPECT_TRUE(at::equal(sum_of(windows, Shards({}, 9, 1)), chain));
  EXPECT_TRUE(at::equal(sum_of(windows, Shards()), chain));
}

TEST(Shards, WindowsWithoutATermAddNothing) {
  const Tensor windows = rough_terms(16, {4}, 7);
  for (const int64_t size : {1, 2, 3, 5, 8}) {
    ThreadCluster(size).run([&](const Communicator& communicator) {
      const Shards shards(communicator, 16, 8);
      WindowSum some(shards), none(shards);
      const Tensor own = shards.own(windows);
      for (int64_t i = 0; i < own.size(0); ++i) {
        const int64_t window = shards.first_window() + i;
        if (window == 3 || window == 10 || window == 11) some.add(i, own[i].clone());
      }
      EXPECT_TRUE(at::equal(some.total(), windows[3] + (windows[10] + windows[11])));
      EXPECT_FALSE(none.total().defined());
    });
  }
}

TEST(Shards, TheLargestValueIsFoundInEveryDivision) {
  const Tensor windows = random_normal({12, 7}, 8);
  for (const int64_t size : {1, 2, 3, 4}) {
    ThreadCluster(size).run([&](const Communicator& communicator) {
      const Shards shards(communicator, 12, 4);
      WindowSum largest(shards, TreeSum::take_larger);
      const Tensor own = shards.own(windows);
      for (int64_t i = 0; i < own.size(0); ++i) largest.add(i, own[i].clone());
      EXPECT_TRUE(at::equal(largest.total(), windows.amax(0)));
    });
  }
}

TEST(Shards, ProcessesHaveShardsInARow) {
  for (int64_t size = 1; size <= 8; ++size) {
    ThreadCluster(size).run([&](const Communicator& communicator) {
      const Shards shards(communicator, 21, 8);
      const Tensor windows = at::arange(21);
      const Tensor own = shards.own(windows);
      EXPECT_GE(own.size(0), 1);
      EXPECT_EQ(shards.num_windows(own), 21);
      EXPECT_EQ(own[0].item<int64_t>(), shards.first_window());
      for (int64_t i = 0; i < own.size(0); ++i) {
        EXPECT_EQ(shards.owner_of(shards.first_window() + i), communicator.rank);
        EXPECT_GT(shards.end_of_shard(i), i);
        EXPECT_LE(shards.end_of_shard(i), own.size(0));
      }
      EXPECT_TRUE(at::equal(shards.all(own), windows));
      const Tensor gathered = shards.gather(own);
      EXPECT_TRUE(!communicator.is_first() || at::equal(gathered, windows));
      EXPECT_TRUE(at::equal(shards.scatter(gathered), own));
    });
  }
}

TEST(Shards, TooManyProcessesOrShardsAreRefused) {
  EXPECT_THROW(Shards({.rank = 0, .size = 3}, 16, 2), c10::Error);
  EXPECT_THROW(Shards({}, 3, 4), c10::Error);
}

TEST(TreeSum, TermsMayBelongToAnyProcess) {
  const int64_t count = 11;
  const Tensor terms = rough_terms(count, {6}, 9);
  const auto sum_with = [&](const Communicator& communicator, const std::vector<int64_t>& owners) {
    TreeSum sum(communicator, owners);
    for (int64_t i = 0; i < count; ++i) {
      if (owners[static_cast<size_t>(i)] == communicator.rank) sum.add(i, terms[i].clone());
    }
    return sum.total();
  };
  const Tensor alone = sum_with({}, std::vector<int64_t>(count, 0));
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const int64_t size = 1 + static_cast<int64_t>(seed % 5);
    const Tensor drawn = at::randint(size, {count}, test::generator(seed), at::kLong);
    const std::vector<int64_t> owners(drawn.const_data_ptr<int64_t>(), drawn.const_data_ptr<int64_t>() + count);
    ThreadCluster(size).run([&](const Communicator& communicator) {
      EXPECT_TRUE(at::equal(sum_with(communicator, owners), alone)) << "seed " << seed;
    });
  }
}

TEST(TreeSum, OnlyWholeSubtreesAreSent) {
  // Eight shards of four processes: two levels of the tree are within a process, two sums climb and three come back.
  const int64_t bytes = 1000 * 8;
  const auto sent_by = [&](int64_t size) {
    ThreadCluster cluster(size);
    cluster.run([&](const Communicator& communicator) {
      const Shards shards(communicator, 8, 8);
      WindowSum sum(shards);
      for (int64_t i = 0; i < 8 / size; ++i) sum.add(i, at::ones({1000}, at::kDouble));
      EXPECT_EQ(sum.total()[0].item<double>(), 8);
    });
    return cluster.bytes_sent() / bytes;
  };
  EXPECT_EQ(sent_by(1), 0);
  EXPECT_EQ(sent_by(2), 2);
  EXPECT_EQ(sent_by(4), 6);
  EXPECT_EQ(sent_by(8), 14);
}

TEST(Messages, EveryProcessGetsWhatOneGives) {
  for (int64_t size = 1; size <= 9; ++size) {
    for (int64_t from = 0; from < size; from += 2) {
      ThreadCluster(size).run([&](const Communicator& communicator) {
        const bool gives = communicator.rank == from;
        const auto given = [&](const Tensor& tensor) { return gives ? tensor : Tensor(); };
        const Tensor codes = at::arange(24, at::kChar).view({2, 3, 4});
        EXPECT_TRUE(at::equal(broadcast(communicator, given(codes), from), codes));
        EXPECT_TRUE(
            at::equal(broadcast(communicator, given(codes.permute({2, 0, 1})), from), codes.permute({2, 0, 1})));
        EXPECT_FALSE(broadcast(communicator, Tensor(), from).defined());
        EXPECT_EQ(broadcast(communicator, given(at::empty({0, 3})), from).sizes(), at::IntArrayRef({0, 3}));
        EXPECT_EQ(broadcast(communicator, given(at::scalar_tensor(3, at::kHalf)), from).scalar_type(), at::kHalf);
        EXPECT_EQ(broadcast(communicator, std::string(gives ? "text" : ""), from), "text");
        std::map<std::string, Tensor> tensors;
        if (gives) tensors = {{"a", codes}, {"b", Tensor()}};
        const auto shared = broadcast(communicator, tensors, from);
        ASSERT_EQ(shared.size(), 2U);
        EXPECT_TRUE(at::equal(shared.at("a"), codes));
        EXPECT_FALSE(shared.at("b").defined());
      });
    }
  }
}

TEST(Messages, TheEndOfAProcessEndsTheOthers) {
  ThreadCluster cluster(3);
  EXPECT_THROW(cluster.run([](const Communicator& communicator) {
    TORCH_CHECK(communicator.rank != 1, "out of memory");
    broadcast(communicator, communicator.rank == 1 ? at::ones({1}) : Tensor(), 1);
  }),
               c10::Error);
  EXPECT_EQ(cluster.messages().size(), 3U);
  EXPECT_NE(cluster.messages().at(2).find("process 1 has ended"), std::string::npos);
}

}  // namespace
}  // namespace baseq
