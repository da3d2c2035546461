#include "baseq/pipeline/job.h"

#include "baseq/tokenizer/token_windows.h"
#include "run_description.h"

namespace baseq {

Tensor calibration_windows(const std::filesystem::path& file, const Job& job) {
  return read_calibration(
      file, model_path(job) / "tokenizer.json",
      {.num_samples = job.recipe.num_samples, .seq_len = job.recipe.seq_len, .seed = job.options.seed});
}

}  // namespace baseq
