#include "svg_chart.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "html.h"

namespace baseq {
namespace {

constexpr int kNumColors = 6;
constexpr double kLogarithmicFrom = 20;
/// Beyond it a value is taken for damage: sums and squares of coordinates stay finite.
constexpr double kLargest = 1e30;

bool drawable(double value) { return std::abs(value) < kLargest; }

/// The y axis of a chart.
class Scale {
 public:
  Scale(const std::vector<ChartSeries>& series, double top, double bottom) : top_(top), bottom_(bottom) {
    double min = std::numeric_limits<double>::infinity(), max = -min;
    for (const ChartSeries& one : series) {
      for (const double value : one.values) {
        if (!drawable(value)) continue;
        min = std::min(min, value);
        max = std::max(max, value);
      }
    }
    if (min > max) min = 0, max = 1;
    logarithmic_ = min > 0 && max > kLogarithmicFrom * min;
    if (!logarithmic_) min = std::min(min, 0.0);
    if (min == max) max = min < 0 ? 0 : min + 1;
    low_ = map(min);
    high_ = map(max);
    const double margin = 0.06 * (high_ - low_);
    high_ += margin;
    if (logarithmic_ || low_ < 0) low_ -= margin;
  }

  double y(double value) const { return bottom_ - (map(value) - low_) / (high_ - low_) * (bottom_ - top_); }

  std::vector<double> ticks() const {
    std::vector<double> result;
    if (logarithmic_) {
      const double decades = high_ - low_;
      const int stride = std::max(1, static_cast<int>(decades / 5));
      for (int decade = static_cast<int>(std::floor(low_)); decade <= high_; decade += stride) {
        for (const double digit : {1.0, 2.0, 5.0}) {
          if (digit != 1 && decades > 2.5) continue;
          const double value = digit * std::pow(10.0, decade);
          if (map(value) >= low_ && map(value) <= high_) result.push_back(value);
        }
      }
      return result;
    }
    const double raw = (high_ - low_) / 4, power = std::pow(10.0, std::floor(std::log10(raw)));
    const double step = power * (raw / power < 1.5 ? 1 : raw / power < 3.5 ? 2 : raw / power < 7.5 ? 5 : 10);
    for (double k = std::ceil(low_ / step); k * step <= high_ * (1 + 1e-12); ++k) result.push_back(k * step);
    return result;
  }

 private:
  double map(double value) const { return logarithmic_ ? std::log10(value) : value; }

  double top_, bottom_, low_ = 0, high_ = 1;
  bool logarithmic_ = false;
};

/// Indices of about `count` labels out of `size`.
std::vector<size_t> spread(size_t size, size_t count) {
  std::vector<size_t> result;
  const size_t stride = std::max<size_t>(1, (size + count - 1) / count);
  for (size_t i = 0; i < size; i += stride) result.push_back(i);
  return result;
}

std::string text(double x, double y, const char* attributes, const std::string& content) {
  return fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" {}>{}</text>\n", x, y, attributes, escape_html(content));
}

std::string open_svg(int width, int height, const std::string& title) {
  return fmt::format("<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\">\n", width, height,
                     escape_html(title)) +
         text(0, 14, "class=\"chart-title\"", title);
}

std::string legend(const LineChart& chart, double y) {
  std::string svg;
  double x = chart.width;
  for (size_t i = chart.series.size(); i-- > 0;) {
    x -= 6.4 * static_cast<double>(chart.series[i].name.size()) + 28;
    svg += fmt::format("<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"10\" height=\"10\" rx=\"2\" class=\"fill-{}\"/>\n", x,
                       y - 9, i % kNumColors + 1);
    svg += text(x + 14, y, "class=\"label\"", chart.series[i].name);
  }
  return svg;
}

}  // namespace

std::string to_svg(const LineChart& chart) {
  const double left = 52, right = chart.width - 8, top = 40, bottom = chart.height - 34;
  const Scale scale(chart.series, top, bottom);
  std::string svg = open_svg(chart.width, chart.height, chart.title);
  for (const double tick : scale.ticks()) {
    const double y = scale.y(tick);
    svg += fmt::format("<line x1=\"{}\" x2=\"{}\" y1=\"{:.1f}\" y2=\"{:.1f}\" class=\"grid\"/>\n", left, right, y, y);
    svg += text(left - 6, y + 4, "class=\"label\" text-anchor=\"end\"", fmt::format("{:.3g}", tick));
  }
  const double step = chart.x.size() > 1 ? (right - left - 16) / static_cast<double>(chart.x.size() - 1) : 0;
  const auto x_of = [&](size_t i) {
    return chart.x.size() > 1 ? left + 8 + step * static_cast<double>(i) : (left + right) / 2;
  };
  for (const size_t i : spread(chart.x.size(), static_cast<size_t>(chart.width / 36))) {
    svg += text(x_of(i), bottom + 15, "class=\"label\" text-anchor=\"middle\"", chart.x[i]);
  }
  svg += text((left + right) / 2, chart.height - 4, "class=\"label\" text-anchor=\"middle\"", chart.x_label);
  svg += text(0, 30, "class=\"label\"", chart.y_label);
  if (chart.series.size() > 1) svg += legend(chart, 14);
  for (size_t s = 0; s < chart.series.size(); ++s) {
    const ChartSeries& series = chart.series[s];
    std::string path, dots;
    bool joined = false;
    for (size_t i = 0; i < std::min(series.values.size(), chart.x.size()); ++i) {
      const double value = series.values[i];
      if (!drawable(value)) {
        joined = false;
        continue;
      }
      const double x = x_of(i), y = scale.y(value);
      path += fmt::format("{}{:.1f} {:.1f}", joined ? "L" : "M", x, y);
      joined = true;
      const std::string name = chart.series.size() > 1 ? series.name + ", " : "";
      dots += fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"2.5\"><title>{}</title></circle>\n", x, y,
                          escape_html(fmt::format("{}{} {}: {:.4g}", name, chart.x_label, chart.x[i], value)));
    }
    svg += fmt::format("<g class=\"series-{}\"><path d=\"{}\"/>\n{}</g>\n", s % kNumColors + 1, path, dots);
  }
  return svg + "</svg>\n";
}

std::string to_svg(const HeatMap& map) {
  constexpr int kWidth = 720, kRow = 20;
  const double left = 120, top = 26;
  const int height = static_cast<int>(top) + kRow * static_cast<int>(map.y.size()) + 36;
  double min = std::numeric_limits<double>::infinity(), max = 0;
  for (const auto& row : map.values) {
    for (const double value : row) {
      if (!(value > 0) || !drawable(value)) continue;
      min = std::min(min, value);
      max = std::max(max, value);
    }
  }
  const double span = max > min ? std::log(max / min) : 1;
  const double cell = (kWidth - left) / static_cast<double>(std::max<size_t>(1, map.x.size()));
  std::string svg = open_svg(kWidth, height, map.title);
  if (max > 0) {
    svg += text(kWidth, 14, "class=\"label\" text-anchor=\"end\"",
                fmt::format("{:.2e} (light) to {:.2e} (dark)", min, max));
  }
  for (size_t r = 0; r < map.y.size(); ++r) {
    const double y = top + kRow * static_cast<double>(r);
    svg += text(left - 8, y + 14, "class=\"label\" text-anchor=\"end\"", map.y[r]);
    for (size_t c = 0; c < std::min(map.x.size(), map.values[r].size()); ++c) {
      const double value = map.values[r][c];
      if (!(value > 0) || !drawable(value)) continue;
      svg += fmt::format(
          "<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.2f}\" height=\"{}\" class=\"heat\" fill-opacity=\"{:.3f}\">"
          "<title>{}</title></rect>\n",
          left + cell * static_cast<double>(c), y, cell - (cell > 4 ? 1 : 0), kRow - 1,
          0.08 + 0.92 * std::log(value / min) / span,
          escape_html(fmt::format("{}, {} {}: {:.4g}", map.y[r], map.x_label, map.x[c], value)));
    }
  }
  const double bottom = top + kRow * static_cast<double>(map.y.size());
  for (const size_t c : spread(map.x.size(), 20)) {
    svg += text(left + cell * (static_cast<double>(c) + 0.5), bottom + 14, "class=\"label\" text-anchor=\"middle\"",
                map.x[c]);
  }
  svg += text((left + kWidth) / 2, bottom + 30, "class=\"label\" text-anchor=\"middle\"", map.x_label);
  return svg + "</svg>\n";
}

}  // namespace baseq
