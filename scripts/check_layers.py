#!/usr/bin/env python3
"""Check that every file includes only its own module and the modules below it.

    python scripts/check_layers.py [REPOSITORY]

Prints each violation as file:line and exits 1 if there is one. Standard library only.
"""

import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path, PurePosixPath

# Bottom to top: what a module may include besides itself. tools/, tests/, benchmarks/, examples/ may include anything.
ALLOWED = {
    "io": set(),
    "tokenizer": {"io"},
    "kernels": set(),
    "quant": set(),
    "cluster": set(),
    "transform": set(),
    "conv": {"quant", "integer"},
    "integer": {"quant"},
    "model": {"io", "tokenizer", "quant", "transform", "integer"},
    "formats": {"io", "tokenizer", "quant", "transform", "model"},
    "runtime": {"io", "tokenizer", "quant", "transform", "integer", "model", "formats"},
    "pipeline": {"io", "tokenizer", "quant", "cluster", "transform", "model", "formats", "runtime"},
    "export": {"io", "tokenizer", "quant", "transform", "model", "formats", "pipeline"},
    "eval": {"io", "tokenizer", "quant", "cluster", "transform", "model", "formats", "pipeline"},
    "report": {"io", "quant", "model", "pipeline", "eval"},
}
EVERYWHERE = {"baseq/tensor.h", "baseq/version.h"}
# Each costs every user of a header many seconds per file; <ATen/core/Tensor.h> declares the type.
NOT_IN_PUBLIC_HEADERS = {"torch/torch.h", "torch/all.h", "ATen/ATen.h"}

UMBRELLA = "baseq.h"  # for whoever does not mind

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
SUFFIXES = {".h", ".hpp", ".cuh", ".cpp", ".cu", ".inl"}


def module_of(path: PurePosixPath) -> str | None:
    """include/baseq/<module>/... and src/<module>/... -> module; None for a file in no module."""
    for prefix in ("include/baseq", "src"):
        if path.is_relative_to(prefix) and len(path.relative_to(prefix).parts) > 1:
            return path.relative_to(prefix).parts[0]
    return None


def format_of(path: PurePosixPath) -> str | None:
    """src/formats/<format>/... -> format; None for other files."""
    inside = path.is_relative_to("src/formats") and len(path.parts) > 3
    return path.parts[2] if inside else None


def normalize(path: PurePosixPath) -> PurePosixPath:
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts = parts[:-1]
        else:
            parts.append(part)
    return PurePosixPath(*parts)


def resolve(root: Path, file: PurePosixPath, quoted: bool, name: str) -> PurePosixPath | None:
    """The file of this repository that an include names, or None for one from elsewhere."""
    folders = ([file.parent] if quoted else []) + [PurePosixPath("include"), PurePosixPath("src")]
    candidates = [normalize(folder / name) for folder in folders]
    for candidate in candidates:
        if (root / candidate).is_file():
            return candidate
    return PurePosixPath("include") / name if name.startswith("baseq/") else None


def violations_in(root: Path, file: PurePosixPath) -> list[str]:
    module = module_of(file)
    found = []
    if module is not None and module not in ALLOWED:
        return [f"{file}:1: module '{module}' has no place in the layers; give it one in scripts/check_layers.py"]
    for number, line in enumerate((root / file).read_text(encoding="utf-8").splitlines(), start=1):
        if not (match := INCLUDE.match(line)):
            continue
        name = match[2]
        if file.is_relative_to("include") and name in NOT_IN_PUBLIC_HEADERS and file.name != UMBRELLA:
            found.append(f"{file}:{number}: a public header includes <{name}>; include <ATen/core/Tensor.h>")
        target = resolve(root, file, match[1] == '"', name)
        if target is None or module is None or target.relative_to(target.parts[0]).as_posix() in EVERYWHERE:
            continue
        other = module_of(target)
        if other is None:
            found.append(f"{file}:{number}: {module} includes '{name}', which is in no module")
        elif format_of(file) and format_of(target) not in (None, format_of(file)):
            found.append(f"{file}:{number}: {format_of(file)} includes '{name}': a format knows no other one")
        elif other != module and other not in ALLOWED[module]:
            below = ", ".join(sorted(ALLOWED[module])) or "no other module"
            found.append(f"{file}:{number}: {module} includes '{name}' of {other}; it may include {below}")
    return found


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    files = sorted(
        PurePosixPath(path.relative_to(root).as_posix())
        for folder in ("include", "src")
        for path in (root / folder).rglob("*")
        if path.suffix in SUFFIXES
    )
    TopologicalSorter(ALLOWED).prepare()  # raises CycleError for a circle of modules
    if not files:
        sys.exit(f"check_layers: no sources in {root}")
    violations = [violation for file in files for violation in violations_in(root, file)]
    print("\n".join(violations) if violations else f"{len(files)} files keep to the layers")
    sys.exit(1 if violations else 0)


if __name__ == "__main__":
    main()
