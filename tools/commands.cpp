#include "commands.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <malloc.h>

#include "baseq/io/hub_cache.h"
#include "baseq/io/json_object.h"

namespace baseq::cli {

namespace {

CLI::Validator checkpoint_validator(bool file) {
  return CLI::Validator(
      [file](std::string& model) {
        std::error_code error;
        if (file && std::filesystem::is_regular_file(model, error)) return std::string();
        try {
          model = resolve_checkpoint(model).string();
          return std::string();
        } catch (const c10::Error& failure) {
          return std::string(failure.what_without_backtrace());
        }
      },
      "MODEL");
}

}  // namespace

CLI::Validator checkpoint_directory() { return checkpoint_validator(/*file=*/false); }
CLI::Validator checkpoint_path() { return checkpoint_validator(/*file=*/true); }

void add_common_options(CLI::App& command, CommonOptions& options) {
  command.add_option("--device", options.device, "Where to compute: cpu or cuda (cuda:1, ...)")->capture_default_str();
  command.add_option("--threads", options.threads, "CPU threads (default: as many as the machine has)")
      ->check(CLI::Range(1, 4096));
  command.add_option("--seed", options.seed, "Seed of every random choice")->capture_default_str();
  command.add_option("--json", options.json, "Write the results to this file as JSON");
  command.add_flag("--quiet", options.quiet, "No progress on stderr");
}

at::Device apply(const CommonOptions& options) {
  if (options.threads > 0) at::set_num_threads(options.threads);
  const at::Device device(options.device);
  TORCH_CHECK(device.is_cpu() || (device.is_cuda() && at::hasCUDA()), "--device ", options.device,
              ": this LibTorch offers cpu", at::hasCUDA() ? " and cuda" : " only");
  return device;
}

void write_json(const CommonOptions& options, const nlohmann::json& object) {
  if (options.json.empty()) return;
  write_json_file(options.json, object);
}

void keep_freed_memory() {
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, -1);
}

void return_freed_memory(int num_bytes) {
  mallopt(M_MMAP_MAX, 1 << 16);
  mallopt(M_MMAP_THRESHOLD, num_bytes);
}

void release_free_memory() { malloc_trim(0); }

}  // namespace baseq::cli
