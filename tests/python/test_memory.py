"""Peak memory is that of one block, however many there are."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

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
    evaluating = {}
    for layers, model in models.items():
        ids = model.parent / "ids.safetensors"
        output = tmp_path / str(layers)
        peak(run, tmp_path / "report.json", "quantize", model, "--recipe", ROOT / "configs" / f"{recipe}.json",
             "--calibration", ids, "--set", "calibration.num_samples=4", "--set", "calibration.seq_len=128",
             "--set", "rounding.mse_clip=false", "--output", output, "--shard-size", 1024)
        evaluating[layers] = peak(run, tmp_path / "report.json", "eval", output, "--tokens", ids, "--seq-len", 128,
                                  "--reference", model)
    assert evaluating[MANY] - evaluating[FEW] < limit, evaluating
    # Of one run: the heap settles within its first blocks, and two runs differ by how.
    log = (tmp_path / str(MANY) / "quantization_log.jsonl").read_text().splitlines()
    peaks = [event["peak_memory_bytes"] for event in map(json.loads, log) if event["event"] == "block_finished"]
    assert len(peaks) == MANY
    assert peaks[-1] - peaks[FEW - 1] < limit, peaks
