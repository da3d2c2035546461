#include "resident.h"

#include "commands.h"
#include "io/machine_limits.h"
#include "io/units.h"
#include "pipeline/footprint.h"

namespace baseq::cli {

void check_resident_memory(const std::string& name, const Model& model, const LoadOptions& options, int64_t context,
                           int64_t sequences) {
  const auto available = available_memory();
  const int64_t needed = resident_memory(model, options, context, sequences) + kProcessBytes;
  TORCH_CHECK(!available || needed <= *available || !model.options().device.is_cpu(), name, ": needs about ",
              format_bytes(needed), " with a context of ", context, " tokens, but ", format_bytes(*available),
              " of memory are free");
}

Decoder load_resident(const Model& model, const LoadOptions& options) {
  constexpr int kUnpackedWeight = 1 << 20;
  return_freed_memory(kUnpackedWeight);
  Decoder decoder = model.load(options);
  keep_freed_memory();
  release_free_memory();
  return decoder;
}

}  // namespace baseq::cli
