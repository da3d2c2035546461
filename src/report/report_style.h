#pragma once

namespace baseq {

/// Of html_report: colors once for light and once for dark pages, the charts take theirs from here.
inline constexpr const char* kReportStyle = R"css(
:root {
  color-scheme: light dark;
  --page: #ffffff; --panel: #f6f7f9; --ink: #1b1f24; --faint: #5d6672; --line: #dfe3e8; --accent: #1f5fbf;
  --series-1: #1f5fbf; --series-2: #d4660c; --series-3: #1b8a5a; --series-4: #8a4fbf; --series-5: #b3263e;
  --series-6: #7a6a12; --heat: #b3401a; --good: #1b8a5a; --bad: #b3263e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --panel: #1d2126; --ink: #e6e9ed; --faint: #9aa4b0; --line: #323941; --accent: #7fb0ff;
    --series-1: #7fb0ff; --series-2: #ffa45c; --series-3: #5fd3a0; --series-4: #c9a0f5; --series-5: #ff8a9c;
    --series-6: #d8c65a; --heat: #ff9a6b; --good: #5fd3a0; --bad: #ff8a9c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 2.4rem 0 .6rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); font-size: 1.2rem; }
p { margin: .4rem 0 1rem; color: var(--faint); max-width: 46rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.4rem 0; }
.card { padding: .7rem .9rem; border: 1px solid var(--line); border-radius: 8px; background: var(--panel); }
.card b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.card span { color: var(--faint); font-size: .85rem; }
.chart { margin: .8rem 0; padding: .9rem 1rem .5rem; border: 1px solid var(--line); border-radius: 8px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: .8rem; }
.charts .chart { margin: 0; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .8rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
thead th { color: var(--faint); font-weight: 600; }
tbody th { font-weight: 500; }
.number { text-align: right; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--accent); }
pre { padding: .9rem 1rem; overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; background: var(--panel); font-size: .82rem; line-height: 1.4; }
.warning { padding: .5rem .9rem; border-left: 3px solid var(--bad); background: var(--panel); margin: .4rem 0; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--ink); font-size: 11px; }
svg .chart-title { font-size: 13px; font-weight: 600; }
svg .label { fill: var(--faint); }
svg .grid { stroke: var(--line); }
svg path { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .heat { fill: var(--heat); }
.series-1 path { stroke: var(--series-1); } .series-1 circle, .fill-1 { fill: var(--series-1); }
.series-2 path { stroke: var(--series-2); } .series-2 circle, .fill-2 { fill: var(--series-2); }
.series-3 path { stroke: var(--series-3); } .series-3 circle, .fill-3 { fill: var(--series-3); }
.series-4 path { stroke: var(--series-4); } .series-4 circle, .fill-4 { fill: var(--series-4); }
.series-5 path { stroke: var(--series-5); } .series-5 circle, .fill-5 { fill: var(--series-5); }
.series-6 path { stroke: var(--series-6); } .series-6 circle, .fill-6 { fill: var(--series-6); }
@media print { details:not([open]) > *:not(summary) { display: block; } }
)css";

}  // namespace baseq
