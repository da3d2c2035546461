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

from tiny_runs import config_file

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "data" / "tiny_llama_base"
# How much of a recipe a run of a second or two needs: none learns, learned stages.
RECIPES = {
    "quarot-w4a4kv4": ["calibration.num_samples=24", "calibration.seq_len=256"],
    "baseq-w4a4kv4": ["calibration.num_samples=8", "calibration.seq_len=64", "steps.5.epochs=2",
                      "steps.9.epochs=3"],
}
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
    def build(output: Path, work: Path, calibration: Path | None = None, recipe: str = "quarot-w4a4kv4") -> list[str]:
        settings = [part for setting in RECIPES[recipe] for part in ("--set", setting)]
        return [binary, "quantize", str(deep), "--recipe", str(config_file(recipe)), "--calibration",
                str(calibration or deep.parent / "ids.safetensors"), "--output", str(output), "--work", str(work),
                "--threads", "1", *settings]

    return build


def files(directory: Path) -> dict[str, bytes]:
    """What is the same in equal runs: all but the log, which holds times."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "quantization_log.jsonl"}


@pytest.fixture
def stop_and_resume(command, binary, tmp_path):
    """stop_and_resume(recipe, signal, times): stops a run that often, at random, and compares its bytes with a whole
    one's; returns the messages of the processes."""

    def call(recipe: str, signal_sent: int, times: int) -> list[str]:
        start = time.monotonic()
        subprocess.run(command(tmp_path / "whole", tmp_path / "work-whole", recipe=recipe), check=True,
                       capture_output=True, env=ENVIRONMENT)
        duration = time.monotonic() - start
        expected = files(tmp_path / "whole")
        generator = random.Random(0)
        output, work, messages = tmp_path / "output", tmp_path / "work", []
        begin = command(output, work, recipe=recipe)
        for _ in range(times):
            go_on = [binary, "quantize", "--resume", str(work)] if (work / "run.json").exists() else begin
            process = subprocess.Popen(go_on, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                       env=ENVIRONMENT)
            time.sleep(generator.uniform(0, duration))
            process.send_signal(signal_sent)
            messages.append(process.communicate()[1])
            # Stopped, at once before it listens to signals, or done before the signal came; never a failure.
            assert process.returncode in (-signal_sent, 130, 0), messages[-1]
            if output.exists():  # complete, or it would not have its name
                assert files(output) == expected
                for path in (output, work):
                    subprocess.run(["rm", "-r", str(path)], check=True)
        if not output.exists():
            done = subprocess.run(begin, capture_output=True, env=ENVIRONMENT, check=False)
            assert done.returncode == 0, done.stderr.decode()
        assert files(output) == expected
        return messages

    return call


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kills", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments(stop_and_resume, recipe, kills):
    messages = stop_and_resume(recipe, signal.SIGKILL, kills)
    resumed = [message for message in messages if "continuing after block" in message or "continuing in block" in message]
    assert resumed, "no kill left anything behind; the delays do not fit the run"


@pytest.mark.parametrize("recipe", RECIPES)
def test_interrupted_at_random_moments(stop_and_resume, recipe):
    for message in stop_and_resume(recipe, signal.SIGINT, 4):
        assert "--resume" in message or "stopped" not in message


def stop_at(process: subprocess.Popen, line: str) -> str:
    """Sends SIGINT when the program has said that; returns all that it said."""
    said = ""
    for text in process.stderr:
        said += text
        if line in text:
            process.send_signal(signal.SIGINT)
    process.wait()
    return said


def test_interrupt_ends_the_current_step_and_says_how_to_go_on(command, run, tmp_path):
    output, work = tmp_path / "output", tmp_path / "work"
    process = subprocess.Popen(command(output, work), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env=ENVIRONMENT)
    message = stop_at(process, "block 2/")
    assert process.returncode == 130, message
    assert "block 4/" not in message, "the run went on"
    assert "kept are the blocks before" in message
    assert f"--resume {work}" in message
    assert not output.exists()
    done = run("quantize", "--resume", work)
    assert done.returncode == 0, done.stderr
    assert "continuing after block" in done.stderr
    assert output.is_dir()


@pytest.mark.parametrize("line, stage", [("self_attn.q_proj", "transforms"), ("mlp.down_proj", "rounding")])
def test_interrupted_block_goes_on_after_its_last_stage(command, run, tmp_path, line, stage):
    kept = f"stopped in block 1 of 8; kept are the blocks before and this one up to its {stage}"
    for attempt in range(8):  # on a busy machine the stage may be over before the signal arrives
        output, work = tmp_path / f"output{attempt}", tmp_path / f"work{attempt}"
        process = subprocess.Popen(command(output, work, recipe="baseq-w4a4kv4"), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        message = stop_at(process, line)
        assert process.returncode == 130, message
        if kept in message:
            break
    assert kept in message
    done = run("quantize", "--resume", work)
    assert done.returncode == 0, done.stderr
    assert f"continuing in block 1/8, after its {stage}" in done.stderr


def test_resume_refuses_other_options(run, tmp_path):
    (tmp_path / "work").mkdir()
    for option, value in [("--output", tmp_path / "out"), ("--set", "grids.weights.num_bits=3"), ("--seed", 1)]:
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
    changed = command(tmp_path / "other", work) + ["--set", "grids.weights.num_bits=3"]
    done = run(*changed[1:])
    assert done.returncode == 1
    assert "recipe/grids/weights/num_bits (4, now 3)" in done.stderr


def test_another_instruction_set_is_refused(command, run, tmp_path):
    output, work = tmp_path / "output", tmp_path / "work"
    begin = command(output, work)
    subprocess.run(begin, check=True, capture_output=True, env=ENVIRONMENT)
    shutil.rmtree(output)
    done = subprocess.run(begin, capture_output=True, text=True, check=False,
                          env=ENVIRONMENT | {"ATEN_CPU_CAPABILITY": "default"})
    assert done.returncode == 1
    assert re.search(r"holds another run; what differs: instruction_set \(.*, now \"(DEFAULT|NO AVX)", done.stderr), done.stderr
    assert run(*begin[1:]).returncode == 0


def test_a_changed_model_is_refused_and_a_copy_is_not(command, deep, run, tmp_path):
    output, work = tmp_path / "output", tmp_path / "work"
    subprocess.run(command(output, work), check=True, capture_output=True, env=ENVIRONMENT)
    shutil.rmtree(output)
    copied = command(output, work)
    copied[2] = str(shutil.copytree(deep, tmp_path / "copy", copy_function=shutil.copy))  # with other times
    done = run(*copied[1:])
    assert done.returncode == 0, done.stderr
    assert "continuing after block 8/8" in done.stderr
    weights = tmp_path / "copy" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = run(*copied[1:], "--force")
    assert done.returncode == 1
    assert "model/model.safetensors/crc32" in done.stderr
