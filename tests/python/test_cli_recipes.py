"""Built-in recipes, used from a copy of the program in an empty folder."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import SMALL
from tiny_runs import ROOT, TINY, config_file

CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*/*.json"))}
SETTINGS = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture
def alone(binary, tmp_path):
    """alone(*arguments) -> the completed process of a copy of the program, in an empty folder."""
    (tmp_path / "bin").mkdir()
    shutil.copy(binary, tmp_path / "bin" / "baseq")
    folder = tmp_path / "empty"
    folder.mkdir()

    def call(*arguments) -> subprocess.CompletedProcess:
        return subprocess.run([tmp_path / "bin" / "baseq", *map(str, arguments)], cwd=folder, capture_output=True,
                              text=True, timeout=300, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})

    return call


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "quantization_log.jsonl"}


def test_every_recipe_is_listed_with_what_it_needs_and_gives(alone, tmp_path):
    done = alone("recipes", "--json", "recipes.json")
    assert done.returncode == 0, done.stderr
    listed = {recipe["name"]: recipe for recipe in json.loads((tmp_path / "empty" / "recipes.json").read_text())["recipes"]}
    assert set(listed) == set(CONFIGS)
    for name, path in CONFIGS.items():
        grids = json.loads(path.read_text()).get("grids", {})
        for key in ("weights", "input_activations", "kv_cache"):
            assert listed[name][key] == grids.get(key, {}).get("num_bits"), name
        assert listed[name]["group"] == path.parent.name
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in done.stdout.splitlines() if line.startswith("  ")}
    assert set(rows) >= set(CONFIGS)
    assert rows["baseq-w4a4kv4"].split(maxsplit=5) == [
        "4", "4", "4", "yes", "-", "hadamard, scale, matrix, learn, means, gptq, learn"]
    assert rows["rtn-w4a16"].split() == ["4", "g64", "-", "-", "no", "hf,", "compressed-tensors", "rtn"]
    assert rows["rotated"].split() == ["-", "-", "-", "no", "hf", "hadamard"]


def test_a_recipe_is_printed_as_it_is_committed(alone):
    for name in ("baseq-w4a4kv4", "ablation-4-gain", "q4_0-gguf"):
        done = alone("recipes", name)
        assert (done.returncode, done.stdout, done.stderr) == (0, CONFIGS[name].read_text(), "")


def test_a_name_makes_what_the_file_makes(alone, tmp_path, windows):
    empty = tmp_path / "empty"
    for output, recipe in (("by-name", "quarot-w4a4kv4"), ("by-path", config_file("quarot-w4a4kv4"))):
        done = alone("quantize", TINY, "--recipe", recipe, "--calibration", windows, "--output", output, *SETTINGS)
        assert done.returncode == 0, done.stderr
    assert files_of(empty / "by-name") == files_of(empty / "by-path")


def test_a_file_with_the_name_of_a_built_in_recipe_is_warned_of(alone, tmp_path):
    (tmp_path / "empty" / "rtn-w4a16").write_text('{"name": "mine", "steps": []}')
    for recipe, name in (("rtn-w4a16", "rtn-w4a16"), ("./rtn-w4a16", "mine")):
        group = ["--set", "grids.weights.group_size=32"] if name != "mine" else []
        done = alone("quantize", TINY, "--recipe", recipe, "--output", f"out-{name}", "--json", "report.json", *group)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "empty" / "report.json").read_text())["recipe"]["name"] == name
        assert ("--recipe ./rtn-w4a16 reads the file" in done.stderr) == (name != "mine")


def test_an_unknown_recipe_is_answered_with_the_nearest(alone):
    for arguments in (["quantize", TINY, "--recipe", "baseq-w4a4kv", "--output", "out"], ["recipes", "baseq-w4a4kv"]):
        done = alone(*arguments)
        assert done.returncode == 2
        assert "baseq-w4a4kv is neither a built-in recipe nor a file; did you mean baseq-w4a4kv4?" in done.stderr


def test_a_sweep_takes_names(alone, tmp_path):
    sweep = {"output": "results", "models": [str(TINY)],
             "recipes": ["rtn-w8a8", {"recipe": "rtn-w8a8", "name": "w6", "set": {"grids.weights.num_bits": 6}}]}
    (tmp_path / "empty" / "sweep.json").write_text(json.dumps(sweep))
    done = alone("sweep", "sweep.json")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "empty" / "results").iterdir() if path.is_dir()} == {
        f"{TINY.name}-rtn-w8a8", f"{TINY.name}-w6"}
