"""A job of a Slurm of two nodes on this machine: one process is killed, the scheduler's requeue resumes to the same bytes.

Needs root and Debian's slurm-wlm, munge and openmpi-bin, and a program with MPI; skipped, loudly, without them."""

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

ROOT = Path(__file__).resolve().parents[2]
JOB = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --requeue --open-mode=append
if [[ -e $RUNS/work/run.json ]]; then
  srun --mpi=pmix --kill-on-bad-exit=1 "$BASEQ" quantize --resume "$RUNS/work"
else
  srun --mpi=pmix --kill-on-bad-exit=1 "$BASEQ" $ARGUMENTS --work "$RUNS/work" --output "$RUNS/out"
fi || { [[ ${SLURM_RESTART_COUNT:-0} -lt 3 ]] && scontrol requeue "$SLURM_JOB_ID"; exit 1; }
"""


def missing(binary: str) -> str:
    for program in ("slurmctld", "slurmd", "munged", "sbatch"):
        if shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin") is None:
            return f"{program} is not installed"
    if os.geteuid() != 0:
        return "only root can start it"
    version = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    return "baseq was built without MPI (-DBASEQ_MPI=ON)" if "MPI              none" in version else ""


@pytest.fixture
def slurm(binary, tmp_path):
    """The environment of a Slurm that runs."""
    if reason := missing(binary):
        warnings.warn(f"NOT TESTED: runs under Slurm: {reason}")
        pytest.skip(reason)
    environment = os.environ | {"PATH": os.environ["PATH"] + ":/usr/sbin", "OMP_NUM_THREADS": "1", "RUNS": str(tmp_path),
                                "BASEQ": str(Path(binary).resolve()), "SLURM_CONF": str(tmp_path / "slurm/slurm.conf")}
    command = [ROOT / "scripts" / "slurm_here.sh"]
    started = subprocess.run([*command, "start", tmp_path / "slurm"], env=environment, capture_output=True, text=True)
    if started.returncode != 0:
        subprocess.run([*command, "stop", tmp_path / "slurm"], env=environment)
        warnings.warn(f"NOT TESTED: runs under Slurm: it does not start here: {started.stderr}")
        pytest.skip("Slurm does not start here")
    yield environment
    subprocess.run(["scancel", "--full", "--user=root"], env=environment)
    subprocess.run([*command, "stop", tmp_path / "slurm"], env=environment)


def tasks_of(environment: dict) -> list[int]:
    """The processes of the program under this Slurm."""
    found = []
    for directory in Path("/proc").iterdir():
        try:
            words = (directory / "cmdline").read_bytes().split(b"\0")
            if words[0] == environment["BASEQ"].encode() and environment["RUNS"].encode() in b" ".join(words):
                found.append(int(directory.name))
        except (OSError, ValueError):
            continue
    return sorted(found)


@pytest.mark.slow
def test_a_job_whose_process_is_killed_is_requeued_and_resumes(slurm, binary, tmp_path):
    vocab_size = json.loads((TINY / "config.json").read_text())["vocab_size"]
    save_file({"input_ids": np.random.default_rng(2).integers(0, vocab_size, (8, 32), dtype=np.int32)},
              tmp_path / "ids.safetensors")
    arguments = ["quantize", str(TINY), "--recipe", "baseq-w4a4kv4", "--calibration", str(tmp_path / "ids.safetensors"),
                 "--threads", "1"]
    for setting in ("calibration.shards=8", "calibration.num_samples=8", "calibration.seq_len=32",
                    "steps.5.batch_size=4", "steps.9.batch_size=4", "steps.9.epochs=40"):
        arguments += ["--set", setting]
    whole = subprocess.run([binary, *arguments, "--output", tmp_path / "whole"], env=slurm, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    (tmp_path / "job.sh").write_text(JOB)
    log = tmp_path / "job.txt"
    job = subprocess.run(["sbatch", "--parsable", "-o", log, tmp_path / "job.sh"], capture_output=True, text=True,
                         check=True, env=slurm | {"ARGUMENTS": " ".join(arguments)}).stdout.strip()
    deadline = time.monotonic() + 100
    while not (tmp_path / "work" / "journal.json").exists():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    tasks = tasks_of(slurm)
    assert len(tasks) == 2
    os.kill(tasks[-1], signal.SIGKILL)
    deadline = time.monotonic() + 300  # a requeued job waits for two minutes, in which what was killed ends
    while not (tmp_path / "out").exists():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(1)
    shown = subprocess.run(["scontrol", "show", "job", job], env=slurm, capture_output=True, text=True).stdout
    assert "Restarts=1" in shown
    text = log.read_text()
    assert "n2: task 1: Killed" in text or "n1: task 0: Killed" in text, text
    for path in (tmp_path / "whole").iterdir():
        if path.name != "quantization_log.jsonl":
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
