#include "output_files.h"

#include <c10/util/Exception.h>

#include "preflight.h"

namespace baseq::cli {
namespace {

bool stdout_is_taken = false;

}  // namespace

void check_outputs(const CommonOptions& options, const std::vector<OutputFile>& files) {
  std::vector<OutputFile> asked{{"--json", options.json, kJsonMark}}, checked;
  asked.insert(asked.end(), files.begin(), files.end());
  std::vector<std::string> problems;
  for (const OutputFile& file : asked) {
    if (file.path.empty()) continue;
    try {
      check_output_file(file.option, file.path, file.mark);
      for (const OutputFile& other : checked) {
        TORCH_CHECK(!same_output_file(other.path, file.path), other.option, " and ", file.option, " both write to ",
                    file.path);
      }
      checked.push_back(file);
      stdout_is_taken = stdout_is_taken || same_output_file(file.path, "/dev/stdout");
    } catch (const c10::Error& error) {
      problems.emplace_back(error.what_without_backtrace());
    }
  }
  if (!problems.empty()) throw_problems(problems);
}

bool stdout_is_an_output() { return stdout_is_taken; }

}  // namespace baseq::cli
