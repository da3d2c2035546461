#include "write_card.h"

#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include "formats/model_card.h"
#include "io/hub_cache.h"
#include "quant/describe_spec.h"

namespace baseq {
namespace {

constexpr const char* kRun = R"(## Run it

MODEL is this directory, or its name on the Hub once it is in the local cache.

```bash
baseq generate MODEL "Once upon a time"
```
)";
constexpr const char* kRunInPython = R"(
```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(MODEL, trust_remote_code=True, dtype="auto")
```
)";

}  // namespace

std::string quantized_card(const Checkpoint& source, const Recipe& recipe, const Tensor& windows, bool in_python) {
  const SideFiles files = find_side_files(source.path(), source.config());
  if (has_long_readme(files)) return "";
  const Grids& grids = recipe.grids;
  ModelCard card{.source = model_name(source.path()), .base_model = name_on_hub(source)};
  card.title = recipe.name.empty() ? "quantized" : "quantized with " + recipe.name;
  if (grids.weights) card.tags.push_back(fmt::format("{}-bit", grids.weights->num_bits));
  card.facts = {{"weights", describe(grids.weights)},
                {"input activations", describe(grids.input_activations)},
                {"KV cache", describe(grids.kv_cache)},
                {"method", describe_method(recipe)}};
  if (windows.defined()) {
    card.facts.emplace_back("calibration", fmt::format("{} windows of {} tokens", windows.size(0), windows.size(1)));
  }
  card.sections = std::string(kRun) + (in_python ? kRunInPython : "") + "\n## How it was made\n\n`baseq quantize " +
                  card.source + " --recipe recipe.json` with this recipe:\n\n```json\n" + recipe.to_json().dump(2) +
                  "\n```\n";
  return card_text(card, readme_of(files));
}

}  // namespace baseq
