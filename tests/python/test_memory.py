"""Peak memory is that of one block, however many there are."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tiny_runs import GPTQ, config_file, recipe_of, steps_of

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"hidden": 384, "intermediate": 1024, "heads": 6, "vocab": 2048}
BLOCK_BYTES = 4 * (4 * 384 * 384 + 3 * 384 * 1024)  # float32
FEW, MANY = 12, 24


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("synthetic")
    options = [part for key, value in SHAPE.items() for part in (f"--{key}", str(value))]
    for layers in (FEW, MANY):
        subprocess.run([sys.executable, str(ROOT / "scripts" / "synthetic_checkpoint.py"), str(folder / str(layers)),
                        "--layers", str(layers), *options], check=True, capture_output=True)
    ids = np.random.default_rng(0).integers(0, SHAPE["vocab"], (4, 128), dtype=np.int32)
    save_file({"input_ids": ids}, folder / "ids.safetensors")
    return {layers: folder / str(layers) for layers in (FEW, MANY)}


def peak(run, report: Path, *arguments) -> int:
    done = run(*arguments, "--threads", 1, "--quiet", "--json", report)
    assert done.returncode == 0, done.stderr
    return json.loads(report.read_text())["peak_memory_bytes"]


@pytest.mark.parametrize("recipe", ["gptq-w4a16-g64", "baseq-plus-w4a4kv4"])
def test_peak_does_not_grow_with_the_layers(run, models, tmp_path, recipe):
    # What is kept of every block, even packed, would show.
    limit = (MANY - FEW) * BLOCK_BYTES / 8
    config = config_file(recipe)
    (rounding,) = [path for path, step in steps_of(json.loads(config.read_text())) if step["step"] == "round"]
    evaluating = {}
    for layers, model in models.items():
        ids = model.parent / "ids.safetensors"
        output = tmp_path / str(layers)
        peak(run, tmp_path / "report.json", "quantize", model, "--recipe", config, "--calibration", ids, "--set", "calibration.num_samples=4", "--set", "calibration.seq_len=128",
             "--set", f"{rounding}.clip=none", "--output", output, "--shard-size", 1024)
        evaluating[layers] = peak(run, tmp_path / "report.json", "eval", output, "--tokens", ids, "--seq-len", 128,
                                  "--reference", model)
    assert evaluating[MANY] - evaluating[FEW] < limit, evaluating
    # Of one run: the heap settles within its first blocks, and two runs differ by how.
    log = (tmp_path / str(MANY) / "quantization_log.jsonl").read_text().splitlines()
    peaks = [event["peak_memory_bytes"] for event in map(json.loads, log) if event["event"] == "block_finished"]
    assert len(peaks) == MANY
    assert peaks[-1] - peaks[FEW - 1] < limit, peaks


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A small model with a vocabulary of 65536, and token ids."""
    folder = tmp_path_factory.mktemp("wide")
    subprocess.run([sys.executable, str(ROOT / "scripts" / "synthetic_checkpoint.py"), str(folder / "model"), "--layers", "1",
                    "--hidden", "64", "--intermediate", "64", "--heads", "1", "--vocab", "65536"], check=True,
                   capture_output=True)
    ids = np.random.default_rng(0).integers(0, 65536, (8, 128), dtype=np.int32)
    save_file({"input_ids": ids}, folder / "ids.safetensors")
    return folder


def test_logits_are_written_as_they_are_computed(run, wide, tmp_path):
    arguments = ("eval", wide / "model", "--tokens", wide / "ids.safetensors", "--seq-len", 128)
    without = peak(run, tmp_path / "report.json", *arguments)
    output = tmp_path / "logits.safetensors"
    together = peak(run, tmp_path / "report.json", *arguments, "--logits", output)
    assert output.stat().st_size > 8 * 128 * 65536 * 4
    assert together - without < output.stat().st_size / 4


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_a_long_text_is_held_once_beside_its_ids(run, wide, tmp_path, ending):
    text = (ROOT / "data" / "wikitext2-test.txt").read_text(encoding="utf-8")
    peaks = {}
    for times in (1, 16):
        file = tmp_path / f"{times}.{ending}"
        file.write_text(text * times if ending == "txt" else (json.dumps({"text": text}) + "\n") * times)
        recipe = tmp_path / "recipe.json"
        recipe.write_text(json.dumps(recipe_of(GPTQ | {"clip": "none"}, weights={"num_bits": 4},
                                               calibration={"num_samples": 1, "seq_len": 16})))
        peaks[times] = peak(run, tmp_path / "report.json", "quantize", wide / "model", "--recipe", recipe, "--calibration",
                            file, "--output", tmp_path / str(times))
    size = len(text.encode()) * 15
    # The text, and its ids while their array grows; it was five times with the ids in three types.
    assert peaks[16] - peaks[1] < 3.5 * size, (peaks, size)
