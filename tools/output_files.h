#pragma once

#include <fmt/format.h>

#include <string>
#include <utility>
#include <vector>

#include "commands.h"
#include "io/output_file.h"
#include "printable.h"

namespace baseq::cli {

/// What the files that baseq writes hold within their first bytes, by which it knows them again, see check_output_file.
constexpr const char* kJsonMark = "{\n  \"baseq\": \"";
constexpr const char* kTokenIdsMark = R"("baseq":"token ids")";
constexpr const char* kLogitsMark = R"("baseq":"logits")";
constexpr const char* kPageMark = R"(<meta name="generator" content="baseq">)";
constexpr const char* kEventsMark = R"("event":)";

/// A file that an option asks for.
struct OutputFile {
  const char* option;
  std::string path;  ///< empty: not asked for
  const char* mark;
};

/// Checks `files` and the file of --json, to be called before the work; throws c10::Error naming all that is wrong.
void check_outputs(const CommonOptions& options, const std::vector<OutputFile>& files = {});

/// Whether check_outputs() saw a file that goes to stdout.
bool stdout_is_an_output();

/// Prints results for people to stdout, without control characters, unless an output goes there.
template <class... Args>
void print_text(fmt::format_string<Args...> format, Args&&... args) {
  if (!stdout_is_an_output()) fmt::print("{}", printable(fmt::format(format, std::forward<Args>(args)...)));
}

}  // namespace baseq::cli
