"""What goes wrong outside the program is an error that names it; nothing half-written gets a name, finished work stays."""

import json
import os
import shutil
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tiny_runs import ROOT, RTN, TINY, config_file

DATA = ROOT / "tests" / "data"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def model(tmp_path) -> Path:
    shutil.copytree(TINY, tmp_path / "model")
    vocab_size = json.loads((TINY / "config.json").read_text())["vocab_size"]
    ids = np.random.default_rng(1).integers(0, vocab_size, (24, 256), dtype=np.int32)
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    return tmp_path / "model"


@pytest.fixture
def command(binary, model):
    def build(output: Path, work: Path, *options: str) -> list[str]:
        return [binary, "quantize", str(model), "--recipe", str(config_file("quarot-w4a4kv4")),
                "--calibration", str(model.parent / "ids.safetensors"), "--output", str(output), "--work", str(work),
                "--set", "calibration.num_samples=24", "--set", "calibration.seq_len=256", "--threads", "1", *options]

    return build


def interrupted(command: list[str]) -> None:
    """Runs `command` to the end of its first block."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    message = ""
    for line in process.stderr:
        message += line
        if line.startswith("block 1/"):
            process.send_signal(signal.SIGINT)
    assert process.wait() == 130, message


@contextmanager
def mounted(directory: Path, options: str):
    """A tmpfs; skips where this user may not mount one."""
    directory.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], capture_output=True, text=True,
                          check=False)
    if done.returncode != 0:
        pytest.skip(f"NOT TESTED, no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def fill(directory: Path) -> Path:
    path = directory / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return path


def test_disk_that_is_too_small_is_found_before_the_run(run, command, tmp_path):
    with mounted(tmp_path / "disk", "size=64k") as disk:
        done = run(*command(disk / "out", tmp_path / "work")[1:])
        assert done.returncode == 1
        assert "will be written but" in done.stderr
        assert os.listdir(disk) == []
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("full", ["output", "work"])
def test_disk_that_becomes_full_ends_the_run_and_keeps_its_work(run, binary, command, tmp_path, full):
    subprocess.run(command(tmp_path / "whole", tmp_path / "work-whole"), check=True, capture_output=True, env=ENVIRONMENT)
    with mounted(tmp_path / "disk", "size=64m") as disk:
        output = (disk if full == "output" else tmp_path) / "out"
        work = (disk if full == "work" else tmp_path) / "work"
        process = subprocess.Popen(command(output, work), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                   env=ENVIRONMENT)
        message = ""
        while "block 1/" not in message:
            line = process.stderr.readline()
            assert line, message
            message += line
        os.kill(process.pid, signal.SIGSTOP)
        filler = fill(disk)
        os.kill(process.pid, signal.SIGCONT)
        message = process.stderr.read()
        if process.wait() != 0:  # it may have been done before it was stopped
            assert process.returncode == 1
            assert "cannot write" in message and "No space left on device" in message
            assert not output.exists()
            assert sorted(path.name for path in output.parent.iterdir() if path.name.startswith("out")) == []
            filler.unlink()
            done = run("quantize", "--resume", work)
            assert done.returncode == 0, done.stderr
            assert "continuing after block" in done.stderr
        for path in (tmp_path / "whole").iterdir():
            if path.name == "quantization_log.jsonl":  # times
                continue
            assert (output / path.name).read_bytes() == path.read_bytes(), path.name


def test_output_that_cannot_be_written_is_found_before_the_run(run, command, tmp_path):
    with mounted(tmp_path / "disk", "ro") as disk:
        done = run(*command(disk / "out", tmp_path / "work")[1:])
        assert done.returncode == 1
        assert f"{disk}: cannot be written: Read-only file system" in done.stderr
        done = run(*command(tmp_path / "out", disk / "work")[1:])
        assert done.returncode == 1
        assert f"{disk}: cannot be written: Read-only file system" in done.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "work").exists()


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_shard_is_named(run, tmp_path, keep):
    model = tmp_path / "model"
    shutil.copytree(DATA / "tiny_llama_sharded", model)
    shard = model / "model-00002-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    (tmp_path / "recipe.json").write_text(json.dumps(RTN))
    for arguments in (["quantize", model, "--recipe", tmp_path / "recipe.json", "--output", tmp_path / "out"],
                      ["inspect", model]):
        done = run(*arguments)
        assert done.returncode == 1
        assert shard.name in done.stderr and "incomplete download?" in done.stderr
    assert not (tmp_path / "out").exists()


# What is damaged and, in files that stay JSON, behind which text a digit changes.
DAMAGES = [("step-00000.safetensors", None), ("state-00001-quantized.safetensors", None), ("inputs.safetensors", None),
           ("run.json", b'"seed": '), ("journal.json", b'"relative_error": 0.')]


@pytest.mark.parametrize("name, in_front", DAMAGES)
def test_flipped_byte_in_the_work_directory_is_detected(run, command, tmp_path, name, in_front):
    work = tmp_path / "work"
    interrupted(command(tmp_path / "out", work))
    content = bytearray((work / name).read_bytes())
    position = content.index(in_front) + len(in_front) if in_front else -len(content) // 3
    content[position] ^= 1
    (work / name).write_bytes(content)
    done = run("quantize", "--resume", work)
    assert done.returncode == 1
    assert name in done.stderr and "is damaged" in done.stderr
    assert not (tmp_path / "out").exists()


def test_changed_model_is_refused_with_what_differs(run, command, model, tmp_path):
    work = tmp_path / "work"
    interrupted(command(tmp_path / "out", work))
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    done = run("quantize", "--resume", work)
    assert done.returncode == 1
    assert "model/model.safetensors/crc32" in done.stderr
    assert not (tmp_path / "out").exists()


def test_results_that_cannot_be_written_are_an_error(run, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(RTN))
    done = run("quantize", TINY, "--recipe", tmp_path / "recipe.json", "--output", tmp_path / "out", "--json",
               tmp_path / "no" / "report.json")
    assert done.returncode == 1
    assert "report.json" in done.stderr
