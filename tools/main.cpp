#include <c10/util/Exception.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include "baseq/pipeline/quantize_checkpoint.h"
#include "commands.h"

namespace {

// Written down in the README.
constexpr int kFailure = 1;
constexpr int kUsage = 2;
constexpr int kInterrupted = 130;  // as a shell reports a process that SIGINT ended

}  // namespace

int main(int argc, char** argv) {
  baseq::cli::keep_freed_memory();
  spdlog::set_default_logger(spdlog::stderr_color_mt("baseq"));
  spdlog::set_pattern("%^%l%$: %v");
  CLI::App app{"baseq quantizes Llama-style Hugging Face checkpoints after training.", "baseq"};
  app.set_version_flag("--version", "baseq " BASEQ_VERSION);
  app.require_subcommand(1);
  baseq::cli::add_quantize(app);
  baseq::cli::add_eval(app);
  baseq::cli::add_inspect(app);
  baseq::cli::add_tokenize(app);
  baseq::cli::add_export(app);
  baseq::cli::add_report(app);
  baseq::cli::add_compare(app);
  baseq::cli::add_sweep(app);
  try {
    app.parse(argc, argv);
    return 0;
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kUsage;
  } catch (const baseq::Interrupted& interrupted) {
    spdlog::warn("{}", interrupted.what());
    return kInterrupted;
  } catch (const c10::Error& error) {
    spdlog::error("{}", error.what_without_backtrace());
  } catch (const std::exception& error) {
    spdlog::error("{}", error.what());
  }
  return kFailure;
}
