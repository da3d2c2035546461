#pragma once

#include <ATen/core/Tensor.h>

#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>

#include "io/units.h"

/// The baseq program: one file a subcommand, each parses, calls the library and prints.
namespace baseq::cli {

/// Options that several subcommands take.
struct CommonOptions {
  std::string device = "cpu";
  int threads = 0;  ///< 0: as many as this process may use
  uint64_t seed = 0;
  std::string json;
  bool quiet = false;
};

/// Of options that name a file to read: "-" is stdin.
CLI::Validator input_file();
/// Of options that name a file to write: "-" is stdout.
CLI::Validator output_file();
/// A size such as 8G or 1.5GiB, units of 1024; becomes bytes.
CLI::Validator memory_size();
/// What a budget of the memory of a GPU begins with.
inline constexpr const char* kGpuMemory = "gpu=";
/// The same, or "gpu=40G", of which the size is turned into bytes.
CLI::Validator memory_sizes();
/// The name of a built-in recipe or a file to read; "-" is stdin.
CLI::Validator recipe_name();
/// Turns a checkpoint's directory, or "org/name" in the local Hugging Face cache, into the directory.
CLI::Validator checkpoint_directory();
/// The same, and leaves the name of a file (GGUF) as it is.
CLI::Validator checkpoint_path();

/// The common options that a subcommand obeys. Every subcommand with results takes --json.
struct Obeyed {
  bool device = false, threads = false, seed = false;
  bool quiet = false;  ///< it shows progress
};
void add_common_options(CLI::App& command, CommonOptions& options, const Obeyed& obeyed);
/// The text of --version: this program's version, LibTorch's, the instruction set, threads and devices.
std::string describe_version();
/// Sets the thread count and returns the device; throws c10::Error when it does not exist.
at::Device apply(const CommonOptions& options);
/// Writes `object` and the program's version to the file of --json, if there is one.
void write_json(const CommonOptions& options, nlohmann::json object);

/// Where tensors of one size come and go all the time, unmapping each costs more in page faults than the work on it.
void keep_freed_memory();
/// The most that glibc takes as a threshold.
constexpr int kLargestPiece = 32 << 20;
/// What is freed in one piece of at least `num_bytes`, kLargestPiece at most, goes back to the system at once from now
/// on. Where large tensors are made once, or are the work of seconds, what is kept only leaves holes that the next do
/// not fit into.
void return_freed_memory(int num_bytes);
/// Gives memory that is free back to the system. Between blocks: pieces that the next block does not happen to fit
/// would otherwise add up, some 15 MB a block of a model of 3 M parameters a block.
void release_free_memory();

/// Each adds its subcommand to `app`; the callback runs when the command line names it.
void add_quantize(CLI::App& app);
void add_eval(CLI::App& app);
void add_inspect(CLI::App& app);
void add_tokenize(CLI::App& app);
void add_export(CLI::App& app);
void add_report(CLI::App& app);
void add_compare(CLI::App& app);
void add_sweep(CLI::App& app);
void add_update(CLI::App& app);
void add_recipes(CLI::App& app);
void add_generate(CLI::App& app);
void add_bench(CLI::App& app);
void add_quickstart(CLI::App& app);
void add_card(CLI::App& app);
/// Not in the help: what packages install for shells and man, made from the options themselves.
void add_completions(CLI::App& app);
void add_manual(CLI::App& app);

}  // namespace baseq::cli
