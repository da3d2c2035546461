"""Runs of several processes over MPI make the bytes of one process. Skipped, loudly, where there is no MPI."""

import json
import os
import shutil
import signal
import subprocess
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tiny_runs import TINY

# mpirun refuses root and more processes than cores unless it is told.
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1", "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_MCA_btl_vader_single_copy_mechanism": "none"}
SHARDS = ("--set", "calibration.shards=8")


@pytest.fixture(scope="module", autouse=True)
def mpi(binary):
    version = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    missing = "mpirun is not installed" if shutil.which("mpirun") is None else ""
    if "MPI              none" in version:
        missing = "baseq was built without MPI (-DBASEQ_MPI=ON)"
    if missing:
        warnings.warn(f"NOT TESTED: runs of several processes: {missing}")
        pytest.skip(missing)


@pytest.fixture(scope="module")
def windows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cluster") / "ids.safetensors"
    vocab_size = json.loads((TINY / "config.json").read_text())["vocab_size"]
    save_file({"input_ids": np.random.default_rng(2).integers(0, vocab_size, (8, 32), dtype=np.int32)}, path)
    return path


@pytest.fixture
def command(binary, windows):
    def build(processes: int, output: Path, *options, recipe: str = "gptq-w4a16-g64") -> list[str]:
        quantize = [binary, "quantize", str(TINY), "--recipe", recipe, "--calibration", str(windows),
                    "--output", str(output), "--threads", "1", "--set", "calibration.num_samples=8",
                    "--set", "calibration.seq_len=32", *map(str, options)]
        if "g64" in recipe:
            quantize += ["--set", "grids.weights.group_size=32"]
        return quantize if processes == 1 else ["mpirun", "-n", str(processes), *quantize]

    return build


def start(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def files_of(checkpoint: Path) -> dict[str, bytes]:
    """Without the log, which has times."""
    return {path.name: path.read_bytes() for path in sorted(checkpoint.iterdir())
            if path.name != "quantization_log.jsonl"}


@pytest.mark.parametrize("recipe, options", [
    ("gptq-w4a16-g64", ()), ("quarot-w4a4kv4", ()), ("fbquant-w3a16-g64-r16", ("--set", "steps.0.low_rank.steps=20")),
    ("baseq-w4a4kv4", ("--set", "steps.5.batch_size=4", "--set", "steps.9.batch_size=4", "--set", "steps.5.epochs=2",
                       "--set", "steps.9.epochs=2")),
    ("baseq-plus-w4a4kv4", ()),
    *((recipe, ("--set", f"passes.{at}.steps.0.batch_size=4", "--set", f"passes.{at}.steps.0.epochs=2"))
      for recipe, at in (("best-w4a4kv4", 1), ("best-w3a16-g64", 1), ("spinquant-w4a4kv4", 1), ("ostquant-w4a4kv4", 1))),
])
def test_every_number_of_processes_makes_the_same_files(command, tmp_path, recipe, options):
    for processes in (1, 2, 3):
        done = start(command(processes, tmp_path / str(processes), *SHARDS, *options, recipe=recipe))
        assert done.returncode == 0, done.stderr
    for processes in (2, 3):
        assert files_of(tmp_path / str(processes)) == files_of(tmp_path / "1")


def test_a_setting_that_is_missing_is_named(command, tmp_path):
    done = start(command(2, tmp_path / "out"))
    assert done.returncode != 0
    assert "set `calibration.shards` to 2" in done.stderr
    assert not (tmp_path / "out").exists()


def test_evaluation_is_that_of_one_process(binary, windows, tmp_path):
    results = []
    for processes in (1, 2, 3):
        report = tmp_path / f"{processes}.json"
        evaluate = [binary, "eval", str(TINY), "--tokens", str(windows), "--seq-len", "32", "--threads", "1",
                    "--reference", str(TINY), "--json", str(report)]
        done = start(evaluate if processes == 1 else ["mpirun", "-n", str(processes), *evaluate])
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("perplexity") == 1
        result = json.loads(report.read_text())
        results.append({key: result[key] for key in ("perplexity", "mean_kl", "num_tokens", "num_windows")})
    assert results[0] == results[1] == results[2]


def test_memory_is_that_of_one_process(command, tmp_path):
    memory = []
    for processes in (1, 2):
        report = tmp_path / f"{processes}.json"
        done = start(command(processes, tmp_path / "out", *SHARDS, "--dry-run", "--json", report))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("  memory  ") == 1
        assert ("in each of 2 processes" in done.stdout) == (processes == 2)
        memory.append(json.loads(report.read_text())["memory"]["three activation streams"])
    assert memory[0] == 2 * memory[1]


def test_progress_comes_once(command, tmp_path):
    report = tmp_path / "report.json"
    alone = start(command(1, tmp_path / "alone", *SHARDS))
    done = start(command(3, tmp_path / "out", *SHARDS, "--json", report))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("recipe ") == alone.stdout.count("recipe ") == 1
    assert done.stderr.count("block ") == alone.stderr.count("block "), done.stderr
    assert report.exists()


def test_a_process_that_is_killed_ends_the_others_and_any_number_resumes(command, binary, tmp_path):
    options = (*SHARDS, "--set", "steps.5.batch_size=4", "--set", "steps.9.batch_size=4", "--set", "steps.9.epochs=40")
    whole = start(command(1, tmp_path / "whole", *options, recipe="baseq-w4a4kv4"))
    assert whole.returncode == 0, whole.stderr
    work = tmp_path / "work"
    running = subprocess.Popen(command(3, tmp_path / "out", *options, "--work", work, recipe="baseq-w4a4kv4"),
                               env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not (work / "journal.json").exists():
        assert running.poll() is None and time.time() < deadline, running.communicate()
        time.sleep(0.02)
    ranks = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    killed = time.time()
    _, errors = running.communicate(timeout=60)
    assert running.returncode != 0 and time.time() - killed < 60
    assert "process rank" in errors and "Killed" in errors, errors
    assert not (tmp_path / "out").exists()
    resumed = start(["mpirun", "-n", "2", binary, "quantize", "--resume", str(work)])
    assert resumed.returncode == 0, resumed.stderr
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
