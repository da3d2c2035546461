#include <gtest/gtest.h>

#include <random>
#include <set>

#include "../io/temp_directory.h"
#include "targets.h"

namespace baseq {
namespace {

namespace fs = std::filesystem;

constexpr int kMutations = 300;

std::vector<std::string> seeds_of(const std::string& target) {
  const fs::path folder = fs::path(BASEQ_SOURCE_DIR) / "tests" / "fuzz" / "seeds" / target;
  std::vector<std::string> seeds;
  for (const std::string& name : test::list(folder)) seeds.push_back(test::read_bytes(folder / name));
  return seeds;
}

/// `input` after one to four small damages; `other` lends bytes.
std::string mutated(std::string input, const std::string& other, std::mt19937_64& random) {
  const auto below = [&](size_t n) { return n == 0 ? 0 : static_cast<size_t>(random() % n); };
  for (size_t left = 1 + below(4); left > 0; --left) {
    const size_t at = below(input.size()), length = std::min(1 + below(16), input.size() - at);
    switch (below(7)) {
      case 0:
        if (!input.empty()) input[at] = static_cast<char>(input[at] ^ (1 << below(8)));
        break;
      case 1:
        if (!input.empty()) input[at] = static_cast<char>(below(256));
        break;
      case 2:
        input.erase(at, length);
        break;
      case 3:
        input.insert(at, input.substr(at, length));
        break;
      case 4:
        input.resize(at);
        break;
      case 5: {
        const size_t from = below(other.size());
        input.insert(at, other.substr(from, 1 + below(64)));
        break;
      }
      default: {
        constexpr const char* kHostile[] = {"-1",     "9223372036854775807", "18446744073709551615", "1e309", "null",
                                            "[[[[[[", "\"\\u0000\"",         "\xff\xff\xff\xff",     "{}",    "0.5"};
        const size_t digit = input.find_first_of("0123456789", at);
        input.replace(digit == input.npos ? at : digit, 1, kHostile[below(std::size(kHostile))]);
      }
    }
  }
  return input;
}

class Fuzz : public testing::TestWithParam<fuzz::Target> {};

TEST_P(Fuzz, SeedsAndDamagedSeedsAreReadOrRefused) {
  const std::vector<std::string> seeds = seeds_of(GetParam().name);
  ASSERT_FALSE(seeds.empty());
  for (const std::string& seed : seeds) EXPECT_NO_THROW(fuzz::run(GetParam(), seed));
  std::mt19937_64 random(1);
  for (int i = 0; i < kMutations; ++i) {
    const std::string input = mutated(seeds[random() % seeds.size()], seeds[random() % seeds.size()], random);
    ASSERT_NO_THROW(fuzz::run(GetParam(), input)) << "mutation " << i << ":\n" << input;
  }
}

TEST_P(Fuzz, SomeSeedIsAccepted) {
  // Otherwise nothing behind the first check would ever be reached.
  bool accepted = false;
  for (const std::string& seed : seeds_of(GetParam().name)) {
    accepted = accepted || test::error_of([&] { GetParam().run(seed); }).empty();
  }
  EXPECT_TRUE(accepted);
}

TEST(FuzzTargets, EveryFormatWithAReaderHasOne) {
  std::set<std::string> targets;
  for (const fuzz::Target& target : fuzz::kTargets) targets.insert(target.name);
  for (const auto& folder : fs::directory_iterator(fs::path(BASEQ_SOURCE_DIR) / "src" / "formats")) {
    if (!fs::exists(folder.path() / "read.cpp")) continue;
    const std::string name = folder.path().filename().string();
    EXPECT_TRUE(targets.contains(name)) << name;
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, Fuzz, testing::ValuesIn(fuzz::kTargets),
                         [](const auto& target) { return std::string(target.param.name); });

}  // namespace
}  // namespace baseq
