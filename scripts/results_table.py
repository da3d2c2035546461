#!/usr/bin/env python3
"""Print one table of evaluated models.

    python scripts/results_table.py RUNS NAME...

For each NAME it reads RUNS/NAME-eval.json, RUNS/NAME-quantize.json where there is one (time and memory of quantizing),
and the sizes of the files in RUNS/NAME. Standard library only.
"""

import json
import sys
from pathlib import Path

COLUMNS = ("model", "perplexity", "mean KL", "top-1 agreement", "size", "time to quantize", "peak memory")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def show(value: float | None, form: str, factor: float = 1) -> str:
    return "-" if value is None else form.format(value * factor)


def row(runs: Path, name: str) -> tuple[str, ...]:
    evaluated, quantized = read_json(runs / f"{name}-eval.json"), read_json(runs / f"{name}-quantize.json")
    size = sum(file.stat().st_size for file in (runs / name).rglob("*") if file.is_file())
    return (
        name,
        show(evaluated.get("perplexity"), "{:.3f}"),
        show(evaluated.get("mean_kl"), "{:.4f}"),
        show(evaluated.get("top1_agreement"), "{:.1f} %", 100),
        show(size or None, "{:.1f} MB", 1e-6),
        show(quantized.get("seconds"), "{:.1f} s"),
        show(quantized.get("peak_memory_bytes"), "{:.2f} GiB", 2**-30),
    )


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    runs = Path(sys.argv[1])
    rows = [COLUMNS] + [row(runs, name) for name in sys.argv[2:]]
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(COLUMNS))]
    for index, cells in enumerate(rows):
        padded = [cells[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)]
        print("| " + " | ".join(padded) + " |")
        if index == 0:
            print("|" + "-" * (widths[0] + 2) + "|" + "".join("-" * (w + 1) + ":|" for w in widths[1:]))


if __name__ == "__main__":
    main()
