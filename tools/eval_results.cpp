#include "eval_results.h"

#include <c10/util/Exception.h>

#include "io/json_object.h"

namespace baseq::cli {
namespace {

bool is_result(const nlohmann::json& value) {
  return value.is_object() && value.contains("perplexity") && value.contains("model") && value["model"].is_string();
}

}  // namespace

std::vector<nlohmann::json> results_in(const nlohmann::json& written) {
  if (is_result(written)) return {written};
  std::vector<nlohmann::json> found;
  if (written.is_object() && written.contains("models") && written["models"].is_array()) {
    for (const nlohmann::json& model : written["models"]) {
      if (is_result(model)) found.push_back(model);
    }
  }
  return found;
}

std::vector<nlohmann::json> read_results(const std::string& file) {
  std::vector<nlohmann::json> found = results_in(read_json_file(file));
  TORCH_CHECK(!found.empty(), file, ": holds no results; expected what eval --json or compare --json writes");
  return found;
}

}  // namespace baseq::cli
