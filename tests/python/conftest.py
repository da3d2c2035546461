"""Fixtures of the tests that drive the baseq program from outside; BASEQ_BINARY names it, default build/baseq."""

import json
import os
import shutil
import signal
import subprocess
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors

from tiny_runs import LEARNED, TINY

ROOT = Path(__file__).resolve().parents[2]
SEQ_LEN = 48
NUM_WINDOWS = 4
# Makes any recipe of configs/ fit the tiny model and a second of time: its ffn of 96 has no groups of 64.
SMALL = {"calibration.num_samples": NUM_WINDOWS, "calibration.seq_len": SEQ_LEN}

# A run under nohup passes SIGHUP on as ignored; the programs under test must start as in a terminal.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_report_header() -> str:
    return f"transformers {metadata.version('transformers')}"


@pytest.fixture(scope="session")
def binary() -> str:
    path = Path(os.environ.get("BASEQ_BINARY", ROOT / "build" / "baseq"))
    assert path.is_file(), f"{path} does not exist; build baseq_cli or set BASEQ_BINARY"
    return str(path)


@pytest.fixture
def model_with_tokenizer(tmp_path) -> Path:
    """The tiny model with a tokenizer, and rows of the vocabulary for all of its tokens."""
    model, vocab_size = tmp_path / "model_with_tokenizer", 640
    shutil.copytree(TINY, model)
    shutil.copy(ROOT / "tests" / "data" / "tokenizer" / "tokenizer.json", model)
    config = json.loads((model / "config.json").read_text()) | {"vocab_size": vocab_size}
    (model / "config.json").write_text(json.dumps(config))
    tensors = load_file(model / "model.safetensors")
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & set(tensors):
        repeated = tensors[name].repeat(-(-vocab_size // len(tensors[name])), 1)
        tensors[name] = repeated[:vocab_size].contiguous()
    save_tensors(tensors, model / "model.safetensors")
    return model


@pytest.fixture(scope="session")
def run(binary):
    """run(*arguments, variables={...}) -> the completed process; one thread: the same results on every machine."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def call(*arguments, variables: dict | None = None) -> subprocess.CompletedProcess:
        command = [binary, *map(str, arguments)]
        together = environment | (variables or {})
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=together)

    return call


@pytest.fixture(scope="session")
def windows(tmp_path_factory) -> Path:
    """A safetensors file with input_ids [NUM_WINDOWS, SEQ_LEN] of the tiny model's vocabulary."""
    path = tmp_path_factory.mktemp("ids") / "ids.safetensors"
    vocab_size = json.loads((TINY / "config.json").read_text())["vocab_size"]
    ids = np.random.default_rng(0).integers(0, vocab_size, (NUM_WINDOWS, SEQ_LEN), dtype=np.int32)
    save_file({"input_ids": ids}, path)
    return path


@pytest.fixture(scope="session")
def quantize(run, windows):
    """quantize(recipe, output, {dotted path: value}) -> the report that --json writes; asserts success."""

    def call(recipe: dict | Path, output: Path, overrides: dict | None = None, model: Path = TINY, extra=(),
             calibration: Path = windows) -> dict:
        if isinstance(recipe, dict):
            path = output.with_name(output.name + "-recipe.json")
            path.write_text(json.dumps(recipe))
            recipe = path
        report = output.with_name(output.name + "-report.json")
        settings = [part for key, value in (SMALL | (overrides or {})).items() for part in ("--set", f"{key}={value}")]
        done = run("quantize", model, "--recipe", recipe, "--calibration", calibration, "--output", output,
                   "--json", report, "--quiet", *settings, *extra)
        assert done.returncode == 0, done.stderr
        return json.loads(report.read_text())

    return call


@pytest.fixture(scope="session")
def learned(quantize, tmp_path_factory) -> Path:
    """The tiny model as a recipe with both learned stages makes it."""
    output = tmp_path_factory.mktemp("learned") / "out"
    quantize(LEARNED, output)
    return output


@pytest.fixture(scope="session")
def evaluate(run, windows, tmp_path_factory):
    """evaluate(model, *options) -> the report that --json writes; asserts success."""
    folder = tmp_path_factory.mktemp("eval")

    def call(model: Path, *options) -> dict:
        report = folder / "report.json"
        done = run("eval", model, "--tokens", windows, "--seq-len", SEQ_LEN, "--json", report, "--quiet", *options)
        assert done.returncode == 0, done.stderr
        return json.loads(report.read_text())

    return call


@pytest.fixture(scope="session")
def round_off(run):
    """round_off(recipe, output, model): quantizes without calibration; asserts success."""

    def call(recipe: dict, output: Path, model: Path = TINY) -> None:
        path = output.with_name(output.name + "-recipe.json")
        path.write_text(json.dumps(recipe))
        done = run("quantize", model, "--recipe", path, "--output", output, "--quiet")
        assert done.returncode == 0, done.stderr

    return call


@pytest.fixture(scope="session")
def export(run):
    """export(model, format, output, *options) -> the report that --json writes; asserts success."""

    def call(model: Path, name: str, output: Path, *options) -> dict:
        report = output.with_name(output.name + "-export.json")
        done = run("export", model, "--format", name, "--output", output, "--json", report, "--quiet", *options)
        assert done.returncode == 0, done.stderr
        return json.loads(report.read_text())

    return call


@pytest.fixture(scope="session")
def logits_of(run, tmp_path_factory):
    """logits_of(model, windows) -> input_ids and the logits that the program computes of them, float32."""
    folder = tmp_path_factory.mktemp("logits")

    def call(model: Path, windows: tuple[int, int] = (3, 33)) -> tuple[torch.Tensor, torch.Tensor]:
        vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
        ids = torch.randint(vocab_size, windows, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
        save_file({"input_ids": ids.numpy()}, folder / "ids.safetensors")
        done = run("eval", model, "--tokens", folder / "ids.safetensors", "--seq-len", windows[1], "--logits",
                   folder / "logits.safetensors", "--arithmetic", "float", "--quiet")
        assert done.returncode == 0, done.stderr
        tensors = load_file(folder / "logits.safetensors")
        return tensors["input_ids"].long(), tensors["logits"]

    return call
