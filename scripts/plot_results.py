#!/usr/bin/env python3
"""Draws docs/results.svg from the tables of docs/results.md and docs/runtime.md.

    pip install matplotlib==3.11.2; python scripts/plot_results.py

Left: perplexity of recipes with 4-bit weights, activations and cache. Right: speed of such a model beside llama.cpp's Q4_0.
"""
import re
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams |= {"svg.hashsalt": "baseq", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
from matplotlib import pyplot  # noqa: E402

DOCS = Path(__file__).resolve().parent.parent / "docs"
RECIPES = ["quarot-w4a4kv4", "baseq-w4a4kv4", "baseq-plus-w4a4kv4", "best-w4a4kv4"]
OURS, OTHERS, RULE = "#2563a8", "#b9c0c9", "#555b63"


def rows(page: str) -> dict[str, list[str]]:
    """The cells of every row of the page's tables by their first cell, the first row of a name."""
    found: dict[str, list[str]] = {}
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            found.setdefault(name.strip("`"), cells)
    return found


def number(cell: str) -> float:
    """In integers where the cell has both."""
    return float(re.search(r"(?:integers )?([\d.]+)\)?$", cell).group(1))


def perplexities(axes) -> None:
    table = rows("results.md")
    values = [number(table[recipe][0]) for recipe in RECIPES]
    bars = axes.barh(RECIPES[::-1], values[::-1], color=OURS, height=0.6)
    axes.bar_label(bars, [f"{value:.2f}" for value in values[::-1]], padding=3)
    original = number(table["the original, 16 bits"][0])
    axes.axvline(original, color=RULE, linewidth=1, linestyle="--")
    axes.text(original, len(RECIPES) - 0.45, f"original {original:.2f}", color=RULE, ha="center", va="bottom")
    axes.set(xlim=(0, max(values) * 1.15), xlabel="perplexity, WikiText-2: less is better")


def speeds(axes) -> None:
    table = rows("runtime.md")
    contestants = {"llama.cpp Q4_0": OTHERS, "baseq W4A4KV4": OURS}
    places = ["prefill\nof 512 (÷ 5)", "decode\nat 1", "decode\nat 512", "decode\nat 960"]
    for index, (name, color) in enumerate(contestants.items()):
        values = [float(cell) for cell in table[name]]
        heights = [values[0] / 5, *values[1:]]
        bars = axes.bar([place + (index - 0.5) * 0.38 for place in range(4)], heights, width=0.36, color=color, label=name)
        axes.bar_label(bars, [f"{value:.0f}" for value in values], padding=2)
    axes.set_xticks(range(4), places)
    axes.set(ylabel="tokens a second, one thread")
    axes.margins(y=0.35)
    axes.legend(frameon=False, loc="upper right", ncols=2)


def main() -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.2, 3.1), layout="constrained")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    perplexities(left)
    speeds(right)
    figure.savefig(DOCS / "results.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
