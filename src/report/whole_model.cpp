#include "report/whole_model.h"

#include <algorithm>

#include "svg_chart.h"

namespace baseq {

std::string whole_model_section(const RunRecord& run) {
  std::string charts;
  for (const StageLearned& stage : run.model.stages) {
    std::vector<std::string> epochs{"0"};
    std::vector<double> losses{stage.loss_before};
    for (const EpochLearned& epoch : run.model.epochs) {
      if (epoch.stage != stage.stage) continue;
      epochs.push_back(std::to_string(epoch.epoch));
      losses.push_back(epoch.loss);
    }
    charts += "<div class=\"chart\">\n" +
              to_svg(LineChart{.title = "Loss of " + stage.stage,
                               .x_label = "epoch",
                               .y_label = "",
                               .x = epochs,
                               .series = {{"held-out windows", losses}}}) +
              "</div>\n";
  }
  if (charts.empty()) return "";
  return "<h2>The model as a whole</h2>\n"
         "<p>Losses at the head, over windows that were not learned from. The best epoch is kept.</p>\n" +
         charts;
}

}  // namespace baseq
