#include "progress_display.h"

#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "commands.h"
#include "printable.h"

namespace baseq::cli {
namespace {

constexpr int64_t kBarWidth = 8;  // leaves room for the rest in 80 columns

template <class... Fns>
struct Overloaded : Fns... {
  using Fns::operator()...;
};

size_t terminal_columns() {
  winsize size{};
  return ::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

/// Not a "dumb" one, such as an editor's shell window.
bool terminal_redraws_lines() {
  const char* type = std::getenv("TERM");
  return type != nullptr && *type != '\0' && std::string_view(type) != "dumb";
}

std::string start_line(const RunStarted& run) {
  const bool calibrated = run.num_samples > 0;
  return fmt::format("{}: {} blocks{}, {} thread{} on {}", run.model, run.num_blocks,
                     calibrated ? fmt::format(", {} windows of {} tokens", run.num_samples, run.seq_len) : "",
                     run.num_threads, run.num_threads == 1 ? "" : "s", run.device);
}

/// Nothing where no Hessian was damped.
std::string damping_text(double damping) { return damping > 0 ? fmt::format("damping {:<6.3g} ", damping) : ""; }

}  // namespace

ProgressDisplay::ProgressDisplay(bool quiet)
    : quiet_(quiet), terminal_(isatty(STDERR_FILENO) != 0 && terminal_redraws_lines()) {}

ProgressDisplay::~ProgressDisplay() { clear(); }

void ProgressDisplay::clear() {
  if (drawn_) std::fputs("\r\033[K", stderr);
  drawn_ = false;
}

void ProgressDisplay::line(const std::string& text) {
  clear();
  // Not fmt::print, which throws: a run does not end because nobody reads its progress.
  std::fputs((printable(text) + "\n").c_str(), stderr);
  draw();
}

void ProgressDisplay::detail_or_line(const std::string& detail, const std::string& text) {
  if (quiet_) return;
  if (!terminal_) return line(text);
  detail_ = detail;
  draw();
}

void ProgressDisplay::count_error(const std::string& name, int64_t block, double error) {
  if (!std::isfinite(error)) return;
  auto found = std::ranges::find(errors_, name, &decltype(errors_)::value_type::first);
  if (found == errors_.end()) found = errors_.insert(errors_.end(), {name, {}});
  found->second.emplace_back(error, block);
}

void ProgressDisplay::print_errors() {
  if (quiet_ || !terminal_ || errors_.empty()) return;
  total_ = 0;  // no line below the table
  line(fmt::format("{:<34} {:>13} {:>13} {:>9}", "relative error", "median", "worst", "in block"));
  for (auto& [name, errors] : errors_) {
    const auto middle = errors.begin() + static_cast<std::ptrdiff_t>(errors.size() / 2);
    std::nth_element(errors.begin(), middle, errors.end());
    const double median = middle->first;
    const auto [worst, block] = *std::ranges::max_element(errors);
    line(fmt::format("{:<34.34} {:>13.3e} {:>13.3e} {:>9}", name, median, worst, block));
  }
}

void ProgressDisplay::draw() {
  if (quiet_ || !terminal_ || total_ == 0) return;
  const double elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  const int64_t filled = kBarWidth * done_ / total_;
  std::string text = fmt::format("[{}{}] {}/{} {}", std::string(filled, '#'), std::string(kBarWidth - filled, '.'),
                                 done_, total_, what_);
  if (done_ > first_) text += fmt::format("  {} left", format_seconds(elapsed / (done_ - first_) * (total_ - done_)));
  text += "  " + format_bytes(peak_memory_bytes());
  if (!detail_.empty()) text += "  " + detail_;
  // A line that wraps could not be taken back.
  std::fputs(("\r\033[K" + text.substr(0, terminal_columns() - 1)).c_str(), stderr);
  std::fflush(stderr);
  drawn_ = true;
}

void ProgressDisplay::step(int64_t done, int64_t total, const std::string& what) {
  done_ = done;
  total_ = total;
  what_ = what;
  draw();
}

void ProgressDisplay::show(const ProgressEvent& event) {
  std::visit(
      Overloaded{
          [&](const Warning& warning) {
            clear();
            spdlog::warn("{}", warning.message);
            draw();
          },
          [&](const RunResumed& resumed) {
            if (quiet_) return;
            first_ = resumed.num_finished;
            line(resumed.stage.empty()
                     ? fmt::format("continuing after block {}/{}", resumed.num_finished, resumed.num_blocks)
                     : fmt::format("continuing in block {}/{}, after its {}", resumed.num_finished + 1,
                                   resumed.num_blocks, resumed.stage));
          },
          [&](const RunStarted& started) {
            if (!quiet_) line(start_line(started));
          },
          [&](const BlockStarted& started) {
            detail_.clear();
            const bool whole = started.block == kWholeModel;
            step(whole ? 0 : started.block, started.num_blocks, whole ? "the model" : "blocks");
          },
          [&](const EpochLearned& epoch) {
            detail_ = fmt::format("{} {}/{}, loss {:.3e}", epoch.stage, epoch.epoch, epoch.num_epochs, epoch.loss);
            draw();
          },
          [&](const PointMeasured&) {},
          [&](const TransformChosen& choice) {
            detail_or_line(fmt::format("{} {}", choice.site, choice.chain),
                           fmt::format("  {:<18} {}", choice.site, choice.chain));
          },
          [&](const RunFinished&) { print_errors(); },
          [&](const LinearRounded& linear) {
            count_error(linear.name, linear.block, linear.relative_error);
            detail_or_line(fmt::format("{} error {:.3e}", linear.name, linear.relative_error),
                           fmt::format("  {:<18} error {:.3e}  {}{:.2f} s", linear.name, linear.relative_error,
                                       damping_text(linear.damping), linear.seconds));
          },
          [&](const StageLearned& stage) {
            detail_or_line(fmt::format("{} loss {:.3e}", stage.stage, stage.loss_after),
                           fmt::format("  {:<18} loss {:.4e} -> {:.4e}  {:.1f} s", stage.stage, stage.loss_before,
                                       stage.loss_after, stage.seconds));
          },
          [&](const BlockFinished& block) {
            const bool whole = block.block == kWholeModel;
            done_ = whole ? block.num_blocks : block.block + 1;
            if (!whole) count_error("residual stream", block.block, block.relative_error);
            const std::string error = std::isnan(block.relative_error)
                                          ? ""
                                          : fmt::format("  median relative error {:.4f}", block.relative_error);
            const std::string place =
                whole ? "the model" : fmt::format("block {}/{}", block.block + 1, block.num_blocks);
            detail_or_line(
                fmt::format("error {:.3g}", block.relative_error),
                fmt::format("{}{}  {:.1f} s  peak {}", place, error, block.seconds, format_bytes(peak_memory_bytes())));
          },
      },
      event);
}

}  // namespace baseq::cli
