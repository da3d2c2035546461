#!/usr/bin/env python3
"""Check that two builds of the program write the same tensors, bit for bit, for every recipe.

    python scripts/compare_recipes.py BASELINE CANDIDATE MODEL...

BASELINE and CANDIDATE are programs, each MODEL is a checkpoint. Both programs quantize each model with each recipe of
configs/, on few and short windows with one thread, and one table of what differs is printed. Recipes whose group_size
does not divide the sizes of a model get the largest one below that does. A model without a tokenizer.json is given
random token ids. A baseline that reads recipes of another form gets its own of the same names, --baseline-recipes
FOLDER (and its subfolders); names that are in one folder alone are left out. Exits with 1 when a tensor differs or a run fails. Standard
library only.
"""

import argparse
import json
import math
import random
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"


def tensors_of(directory: Path) -> dict[str, tuple]:
    """Name -> (dtype, shape, bytes) for every tensor of a checkpoint."""
    tensors = {}
    for file in directory.glob("*.safetensors"):
        data = file.read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        start = 8 + length
        for name, info in json.loads(data[8:start]).items():
            if name != "__metadata__":
                begin, end = info["data_offsets"]
                tensors[name] = (info["dtype"], info["shape"], data[start + begin : start + end])
    return tensors


def write_random_ids(path: Path, vocab_size: int, shape: tuple[int, int]) -> None:
    values = random.Random(1).choices(range(vocab_size), k=math.prod(shape))
    info = {"input_ids": {"dtype": "I64", "shape": shape, "data_offsets": [0, 8 * len(values)]}}
    header = json.dumps(info).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack(f"<{len(values)}q", *values))


def settings(recipe: dict, config: dict, windows: tuple[int, int]) -> list[str]:
    values = {"calibration.num_samples": windows[0], "calibration.seq_len": windows[1]}
    # Recipes before they had grids have the grid of the weights at the top.
    grids, path = (recipe.get("grids", {}), "grids.weights") if "grids" in recipe else (recipe, "weights")
    if group := grids.get("weights", {}).get("group_size"):
        heads = config["num_attention_heads"]
        attention = heads * config.get("head_dim", config["hidden_size"] // heads)
        values[f"{path}.group_size"] = math.gcd(group, config["hidden_size"], config["intermediate_size"], attention)
    return [word for path, value in values.items() for word in ("--set", f"{path}={value}")]


def quantize(program: Path, model: Path, output: Path, arguments: list[str]) -> str:
    """The message of a run that failed, or ""."""
    command = [program, "quantize", model, "--output", output, "--threads", "1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]


def verdict(model: Path, baseline: Path, candidate: Path, options: argparse.Namespace) -> tuple[str, str]:
    """(number of tensors, what differs or "") of the recipes in these files."""
    config = json.loads((model / "config.json").read_text())
    windows = (options.num_samples, options.seq_len)
    with tempfile.TemporaryDirectory(prefix="compare-recipes-") as scratch:
        calibration = options.calibration
        if not (model / "tokenizer.json").exists():
            calibration = Path(scratch) / "ids.safetensors"
            write_random_ids(calibration, config["vocab_size"], windows)
        written = []
        for program, recipe in (("baseline", baseline), ("candidate", candidate)):
            arguments = ["--recipe", str(recipe), "--calibration", str(calibration)]
            arguments += settings(json.loads(recipe.read_text()), config, windows)
            arguments += [word for value in options.set for word in ("--set", value)]
            output = Path(scratch) / program
            if message := quantize(getattr(options, program), model, output, arguments):
                return "-", f"{program} failed: {message}"
            written.append(tensors_of(output))
    before, after = written
    for pattern, replacement in options.names.items():
        after = {re.sub(pattern, replacement, name): tensor for name, tensor in after.items()}
    if options.added:
        after = {name: tensor for name, tensor in after.items() if name in before or not re.search(options.added, name)}
    names = sorted(before.keys() | after.keys())
    different = [name for name in names if before.get(name) != after.get(name)]
    shown = ", ".join(different[:3]) + (", ..." if len(different) > 3 else "")
    return str(len(names)), f"{len(different)} differ: {shown}" if different else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("baseline", type=Path)
    parser.add_argument("candidate", type=Path)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--recipes", default="*", help="glob of names in configs/ (default: all)")
    parser.add_argument("--baseline-recipes", type=Path, default=CONFIGS, metavar="FOLDER",
                        help="recipes of the baseline (default: configs/)")
    parser.add_argument("--calibration", type=Path, default=ROOT / "data" / "calibration.txt")
    parser.add_argument("--num-samples", type=int, default=2, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=32, help="tokens per window")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of every recipe")
    parser.add_argument("--names", type=lambda path: json.loads(Path(path).read_text()), default={},
                        help="JSON object, regular expression -> replacement, that turns the candidate's names of "
                             "tensors into the baseline's")
    parser.add_argument("--added", metavar="REGEX",
                        help="tensors that only the candidate may have, such as '\\.transform\\.' against a baseline before "
                             "format version 5")
    options = parser.parse_args()
    files = {folder: {path.stem: path for path in folder.rglob(f"{options.recipes}.json")}
             for folder in (CONFIGS, options.baseline_recipes)}
    recipes = sorted(set.intersection(*map(set, files.values())))
    if not recipes:
        sys.exit(f"compare_recipes: no recipe in both folders is named {options.recipes}")
    for name in sorted(set().union(*files.values()) - set(recipes)):
        print(f"{name}: in one folder alone, left out", file=sys.stderr)
    print("| model | recipe | tensors | |\n|---|---|---:|---|")
    failures = 0
    for model in options.models:
        for recipe in recipes:
            count, problem = verdict(model, files[options.baseline_recipes][recipe], files[CONFIGS][recipe], options)
            failures += problem != ""
            print(f"| {model.name} | {recipe} | {count} | {problem or 'same'} |", flush=True)
    total = len(recipes) * len(options.models)
    print(f"\n{total - failures} of {total} are the same", file=sys.stderr)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
