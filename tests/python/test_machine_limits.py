"""A run sees the limits of its control group: in a container or a batch job the size of the machine says nothing."""

import json
import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tiny_runs import GPTQ, TINY, recipe_of

ROOT = Path(__file__).resolve().parents[2]
# The files of both versions and what one value of them is.
MEMORY = {"memory.max": "{}", "memory.limit_in_bytes": "{}"}
CPU = {"cpu.max": "{} 100000", "cpu.cfs_quota_us": "{}"}


def own_group(controller: str) -> Path:
    """The directory of this process's group."""
    groups = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    for names, path in groups.items():
        if controller in names.split(","):
            return Path("/sys/fs/cgroup") / controller / path.lstrip("/")
    return Path("/sys/fs/cgroup") / groups.get("", "/").lstrip("/")


@contextmanager
def group(controller: str, files: dict[str, str], value: int):
    """A group below that of the tests with one limit; skips where this user may not make one."""
    directory = own_group(controller) / f"baseq-test-{os.getpid()}"
    try:
        directory.mkdir()
    except OSError as error:
        pytest.skip(f"NOT TESTED, no control group can be made here: {error}")
    try:
        limit = next((name for name in files if (directory / name).exists()), None)
        if limit is None:
            pytest.skip(f"NOT TESTED, a control group made here has no {controller} limits")
        (directory / limit).write_text(files[limit].format(value))
        yield directory
    finally:
        directory.rmdir()


def dry_run(binary, tmp_path, directory: Path) -> tuple[dict, str]:
    """The plan of a run inside the group."""
    recipe, ids, report = (tmp_path / name for name in ("recipe.json", "ids.safetensors", "report.json"))
    recipe.write_text(json.dumps(recipe_of(GPTQ, weights={"num_bits": 4}, calibration={"num_samples": 4, "seq_len": 32})))
    save_file({"input_ids": np.zeros((4, 32), np.int32)}, ids)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([binary, "quantize", TINY, "--recipe", recipe, "--calibration", ids, "--output", tmp_path / "out",
                           "--dry-run", "--json", report], capture_output=True, text=True, check=False, env=environment,
                          preexec_fn=lambda: (directory / "cgroup.procs").write_text(str(os.getpid())))
    assert done.returncode == 0, done.stderr
    return json.loads(report.read_text()), done.stdout


def test_memory_of_the_group_counts(binary, tmp_path):
    limit = 288 << 20
    with group("memory", MEMORY, limit) as directory:
        plan, _ = dry_run(binary, tmp_path, directory)
    (warning,) = plan["warnings"]
    assert warning.startswith("memory: about ") and " MiB available" in warning
    assert float(warning.split(" needed, ")[1].split(" MiB")[0]) < limit / 2**20


def test_the_quota_of_the_group_is_the_number_of_threads(binary, tmp_path):
    allowed = len(os.sched_getaffinity(0))
    if allowed < 2:
        pytest.skip("NOT TESTED, one CPU is all there is")
    for quota, threads in ((100_000, 1), (150_000, 2)):
        with group("cpu", CPU, quota) as directory:
            plan, printed = dry_run(binary, tmp_path, directory)
        assert plan["num_threads"] == threads
        assert f"  threads {threads}\n" in printed
