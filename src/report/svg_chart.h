#pragma once

#include <string>
#include <vector>

namespace baseq {

/// One line of a chart; a value that is not finite leaves a gap.
struct ChartSeries {
  std::string name;
  std::vector<double> values;  ///< one for each position of the x axis
};

struct LineChart {
  std::string title, x_label, y_label;
  std::vector<std::string> x;  ///< names of the positions
  std::vector<ChartSeries> series;
  int width = 720, height = 240;  ///< units of the view box; the page scales it
};

/// An <svg> with axes, a legend when there are several series, and the values as tooltips. The y axis is logarithmic
/// when all values are positive and span more than a factor of 20. Colors come from the page: --series-1, -2, ...
std::string to_svg(const LineChart& chart);

struct HeatMap {
  std::string title, x_label;
  std::vector<std::string> x, y;            ///< names of columns and rows
  std::vector<std::vector<double>> values;  ///< [rows][columns], positive; others stay empty
};

/// An <svg> with a cell a value, the darker the larger on a logarithmic scale, and the values as tooltips.
std::string to_svg(const HeatMap& map);

}  // namespace baseq
