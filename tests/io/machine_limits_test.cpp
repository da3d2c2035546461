#include "io/machine_limits.h"

#include <gtest/gtest.h>

#include "temp_directory.h"

namespace baseq {
namespace {

using test::TempDirectory;

constexpr int64_t kMiB = 1 << 20;

/// Trees of /proc and /sys as systems show them.
class MachineLimits : public testing::Test {
 protected:
  void write(const std::string& path, const std::string& content) {
    std::filesystem::create_directories((root / path).parent_path());
    test::write_bytes(root / path, content);
  }
  void machine(int64_t mebibytes, const std::string& cpus) {
    write("proc/meminfo", "MemTotal:       65536 kB\nMemFree:        1 kB\nMemAvailable:   " +
                              std::to_string(mebibytes * 1024) + " kB\nHugePages_Total:       0\n");
    write("proc/self/status", "Name:\tbaseq\nGroups:\t\nCpus_allowed:\tff\nCpus_allowed_list:\t" + cpus + "\n");
  }
  /// @param group and mount_root as a container without a namespace of its own shows them
  void version2(const std::string& group, const std::string& mount_root = "/") {
    write("proc/self/cgroup", "0::" + group + "\n");
    write("proc/self/mountinfo", "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n29 22 0:26 " + mount_root +
                                     " /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n");
  }
  void version1(const std::string& group, const std::string& mount_root = "/") {
    write("proc/self/cgroup", "5:memory:" + group + "\n4:cpu,cpuacct:" + group + "\n0::/\n");
    write("proc/self/mountinfo", "30 22 0:27 " + mount_root +
                                     " /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n31 22 0:28 " + mount_root +
                                     " /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n");
  }

  TempDirectory directory;
  std::filesystem::path root = directory.path();
};

TEST_F(MachineLimits, WithoutGroupsTheMachineCounts) {
  EXPECT_FALSE(available_memory(root));
  EXPECT_GE(usable_cpus(root), 1);
  machine(1000, "0-3,8");
  EXPECT_EQ(available_memory(root), 1000 * kMiB);
  EXPECT_EQ(usable_cpus(root), 5);
  version2("/user.slice");
  EXPECT_EQ(available_memory(root), 1000 * kMiB);
  EXPECT_EQ(usable_cpus(root), 5);
}

TEST_F(MachineLimits, Version2CountsEveryGroupAboveTheProcess) {
  machine(1000, "0-15");
  version2("/system.slice/slurm/job_1");
  const std::string slice = "sys/fs/cgroup/system.slice/";
  write(slice + "slurm/job_1/memory.max", "max\n");
  write(slice + "slurm/job_1/memory.current", std::to_string(50 * kMiB) + "\n");
  write(slice + "slurm/job_1/cpu.max", "max 100000\n");
  write(slice + "slurm/memory.max", std::to_string(400 * kMiB) + "\n");
  write(slice + "slurm/memory.current", std::to_string(300 * kMiB) + "\n");
  write(slice + "slurm/memory.stat", "anon 1\ninactive_file " + std::to_string(60 * kMiB) + "\nactive_file 1\n");
  write(slice + "slurm/cpu.max", "350000 100000\n");
  EXPECT_EQ(available_memory(root), 160 * kMiB);
  EXPECT_EQ(usable_cpus(root), 4);
  write(slice + "cpu.max", "10000 100000\n");
  EXPECT_EQ(usable_cpus(root), 1);
}

TEST_F(MachineLimits, AGroupThatIsFullLeavesNothing) {
  machine(1000, "0");
  version2("/a");
  write("sys/fs/cgroup/a/memory.max", "1000\n");
  write("sys/fs/cgroup/a/memory.current", "5000\n");
  EXPECT_EQ(available_memory(root), 0);
}

TEST_F(MachineLimits, InAContainerTheMountIsTheGroup) {
  machine(1000, "0-7");
  for (const auto& [group, mount_root] : {std::pair{"/", "/"}, {"/docker/abc", "/docker/abc"}, {"/../x", "/"}}) {
    SCOPED_TRACE(group);
    version2(group, mount_root);
    write("sys/fs/cgroup/memory.max", std::to_string(100 * kMiB) + "\n");
    write("sys/fs/cgroup/memory.current", std::to_string(10 * kMiB) + "\n");
    write("sys/fs/cgroup/cpu.max", "200000 100000\n");
    EXPECT_EQ(available_memory(root), 90 * kMiB);
    EXPECT_EQ(usable_cpus(root), 2);
  }
}

TEST_F(MachineLimits, Version1CountsAsWell) {
  machine(1000, "0-7");
  version1("/docker/abc");
  const std::string memory = "sys/fs/cgroup/memory/docker/abc/", cpu = "sys/fs/cgroup/cpu/docker/";
  write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
  write("sys/fs/cgroup/memory/memory.usage_in_bytes", "123456789\n");
  write(memory + "memory.limit_in_bytes", std::to_string(200 * kMiB) + "\n");
  write(memory + "memory.usage_in_bytes", std::to_string(90 * kMiB) + "\n");
  write(memory + "memory.stat", "inactive_file 5\ntotal_inactive_file " + std::to_string(40 * kMiB) + "\n");
  write(cpu + "abc/cpu.cfs_quota_us", "-1\n");
  write(cpu + "abc/cpu.cfs_period_us", "100000\n");
  write(cpu + "cpu.cfs_quota_us", "250000\n");
  write(cpu + "cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(available_memory(root), 150 * kMiB);
  EXPECT_EQ(usable_cpus(root), 3);
}

TEST_F(MachineLimits, MountPointsMayHaveBlanks) {
  machine(1000, "0-7");
  write("proc/self/cgroup", "0::/a\n");
  write("proc/self/mountinfo", "29 22 0:26 / /sys/fs/my\\040groups rw - cgroup2 cgroup2 rw\n");
  write("sys/fs/my groups/a/cpu.max", "100000 100000\n");
  EXPECT_EQ(usable_cpus(root), 1);
}

TEST(MachineLimitsHere, AreThoseOfThisMachine) {
  EXPECT_GT(available_memory().value(), 0);
  EXPECT_GE(usable_cpus(), 1);
}

}  // namespace
}  // namespace baseq
