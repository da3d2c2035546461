"""A run that dies at any moment goes on from its work directory to the bytes of a run that did not."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "data" / "tiny_llama_base"
RECIPE = ROOT / "configs" / "quarot-w4a4kv4.json"
# More by hand: BASEQ_KILLS=100 pytest tests/python/test_resume.py
KILLS = int(os.environ.get("BASEQ_KILLS", "12"))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


NUM_LAYERS = 8


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    """The tiny model with its layers repeated, and enough windows that a run is more than its start."""
    directory = tmp_path_factory.mktemp("deep") / "model"
    shutil.copytree(TINY, directory)
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    layers = {name: tensor for name, tensor in tensors.items() if ".layers." in name}
    for index in range(NUM_LAYERS):
        source = index % config["num_hidden_layers"]
        for name, tensor in layers.items():
            if f".layers.{source}." in name:
                tensors[re.sub(r"layers\.\d+", f"layers.{index}", name)] = tensor
    config["num_hidden_layers"] = NUM_LAYERS
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    ids = np.random.default_rng(1).integers(0, config["vocab_size"], (24, 256), dtype=np.int32)
    save_file({"input_ids": ids}, directory.parent / "ids.safetensors")
    return directory


@pytest.fixture
def command(binary, deep):
    def build(output: Path, work: Path, calibration: Path | None = None) -> list[str]:
        return [binary, "quantize", str(deep), "--recipe", str(RECIPE), "--calibration",
                str(calibration or deep.parent / "ids.safetensors"), "--output", str(output), "--work", str(work), "--set",
                "calibration.num_samples=24", "--set", "calibration.seq_len=256", "--threads", "1"]

    return build


def files(directory: Path) -> dict[str, bytes]:
    """What is the same in equal runs: all but the log, which holds times."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "quantization_log.jsonl"}


def test_killed_at_random_moments(command, binary, tmp_path):
    start = time.monotonic()
    subprocess.run(command(tmp_path / "whole", tmp_path / "work-whole"), check=True, capture_output=True,
                   env=ENVIRONMENT)
    duration = time.monotonic() - start
    expected = files(tmp_path / "whole")
    generator = random.Random(0)
    output, work, resumed = tmp_path / "output", tmp_path / "work", 0
    for _ in range(KILLS):
        go_on = [binary, "quantize", "--resume", str(work)] if (work / "run.json").exists() else command(output, work)
        process = subprocess.Popen(go_on, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENVIRONMENT)
        time.sleep(generator.uniform(0, duration))
        process.send_signal(signal.SIGKILL)
        _, message = process.communicate()
        # Killed, or done before the signal came; never a failure.
        assert process.returncode in (-signal.SIGKILL, 0), message.decode()
        resumed += b"continuing after block" in message
        if output.exists():  # complete, or it would not have its name
            assert files(output) == expected
            for path in (output, work):
                subprocess.run(["rm", "-r", str(path)], check=True)
    if not output.exists():
        done = subprocess.run(command(output, work), capture_output=True, env=ENVIRONMENT, check=False)
        assert done.returncode == 0, done.stderr.decode()
    assert files(output) == expected
    assert KILLS < 10 or resumed > 0, "no kill left a block behind; the delays do not fit the run"


def test_interrupt_says_how_to_go_on(command, run, tmp_path):
    output, work = tmp_path / "output", tmp_path / "work"
    process = subprocess.Popen(command(output, work), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env=ENVIRONMENT)
    # The first line of a block comes long before the block ends.
    first = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    message = first + process.stderr.read()
    assert process.wait() == 130, message
    assert f"--resume {work}" in message
    assert not output.exists()
    done = run("quantize", "--resume", work)
    assert done.returncode == 0, done.stderr
    assert "continuing after block" in done.stderr
    assert output.is_dir()


def test_resume_refuses_other_options(run, tmp_path):
    (tmp_path / "work").mkdir()
    for option, value in [("--output", tmp_path / "out"), ("--set", "weights.num_bits=3"), ("--seed", 1)]:
        assert run("quantize", "--resume", tmp_path / "work", option, value).returncode == 2
    done = run("quantize", "--resume", tmp_path / "work")
    assert done.returncode == 1
    assert "holds no run" in done.stderr


def test_vanished_calibration_is_not_missed(command, deep, run, tmp_path):
    calibration = tmp_path / "ids.safetensors"
    shutil.copy(deep.parent / "ids.safetensors", calibration)
    output, work = tmp_path / "output", tmp_path / "work"
    process = subprocess.Popen(command(output, work, calibration), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env=ENVIRONMENT)
    process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 130
    calibration.unlink()
    assert run("quantize", "--resume", work).returncode == 0
    assert output.is_dir()


def test_changed_recipe_is_refused_with_what_differs(command, run, tmp_path):
    output, work = tmp_path / "output", tmp_path / "work"
    subprocess.run(command(output, work), check=True, capture_output=True, env=ENVIRONMENT)
    changed = command(tmp_path / "other", work) + ["--set", "weights.num_bits=3"]
    done = run(*changed[1:])
    assert done.returncode == 1
    assert "recipe/weights/num_bits (4, now 3)" in done.stderr
