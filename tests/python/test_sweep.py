"""Many runs from one file."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tiny_runs import LEARNED, RTN, TINY, events_of


@pytest.fixture
def sweep(run, windows, tmp_path):
    """sweep({changes of the file}, *options) -> the completed process; recipes rtn.json, learned.json are there."""
    for recipe in (RTN, LEARNED):
        (tmp_path / f"{recipe['name']}.json").write_text(
            json.dumps(recipe | {"calibration": {"num_samples": 4, "seq_len": 48}}))
    (tmp_path / "broken.json").write_text('{"wieghts": {}}')
    settings = {"output": str(tmp_path / "sweep"), "models": [str(TINY)], "calibration": str(windows),
                "tokens": str(windows), "seq_len": 48, "originals": True,
                "recipes": [str(tmp_path / "rtn.json"),
                            {"recipe": str(tmp_path / "rtn.json"), "name": "rtn-3", "set": {"weights.num_bits": 3}},
                            str(tmp_path / "broken.json"), str(tmp_path / "learned.json")]}

    def call(changes: dict, *options):
        (tmp_path / "sweep.json").write_text(json.dumps(settings | changes))
        return run("sweep", tmp_path / "sweep.json", "--threads", 1, *options)

    return call


def summary(folder: Path) -> dict:
    return {job["name"]: job for job in json.loads((folder / "sweep" / "summary.json").read_text())["jobs"]}


NAMES = [f"tiny_llama_base{ending}" for ending in ("", "-rtn", "-rtn-3", "-broken", "-learned")]


def test_a_failure_does_not_stop_a_sweep_and_the_next_call_continues(sweep, tmp_path):
    done = sweep({})
    assert done.returncode == 1
    assert "1 of 5 jobs failed" in done.stderr
    jobs = summary(tmp_path)
    assert list(jobs) == NAMES
    assert [job["status"] for job in jobs.values()] == ["passed", "passed", "passed", "failed", "passed"]
    assert "wieghts" in jobs[NAMES[3]]["error"]
    assert jobs[NAMES[0]]["mean_kl"] is None
    assert jobs[NAMES[1]]["mean_kl"] < jobs[NAMES[2]]["mean_kl"]
    assert jobs[NAMES[1]]["model_bytes"] > 0
    table = done.stdout.splitlines()
    assert len(table) == 7
    assert (tmp_path / "sweep" / "summary.md").read_text() == done.stdout
    assert not list((tmp_path / "sweep").glob("*-work"))
    config = json.loads((tmp_path / "sweep" / NAMES[2] / "config.json").read_text())
    assert config["quantization_config"]["weights"]["num_bits"] == 3

    # What is finished stays as it is; what failed is tried again.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").rglob("*.safetensors")}
    (tmp_path / "broken.json").write_text(json.dumps(RTN | {"name": "mended", "calibration": {"num_samples": 4, "seq_len": 48}}))
    done = sweep({})
    assert done.returncode == 0, done.stderr
    assert [job["status"] for job in summary(tmp_path).values()] == ["passed"] * 5
    assert {path: path.stat().st_mtime_ns for path in before} == before

    # Results of other settings are not taken for these.
    done = sweep({"recipes": [{"recipe": str(tmp_path / "rtn.json"), "set": {"weights.num_bits": 5}}]})
    assert done.returncode == 1
    assert "other settings" in done.stderr


def test_an_interrupted_sweep_goes_on_where_it_was(sweep, binary, windows, tmp_path):
    slow = {"recipe": str(tmp_path / "learned.json"), "name": "slow", "set": {"learn_activations.epochs": 60}}
    changes = {"recipes": [slow, str(tmp_path / "rtn.json")], "originals": False}
    assert sweep(changes, "--list").stdout.splitlines() == ["0 tiny_llama_base-slow", "1 tiny_llama_base-rtn"]
    process = subprocess.Popen([binary, "sweep", str(tmp_path / "sweep.json"), "--threads", "1"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    log = tmp_path / "sweep" / "tiny_llama_base-slow-log.jsonl"
    deadline = time.monotonic() + 120
    # By then the first stage is kept.
    while time.monotonic() < deadline and not (log.exists() and "linear_rounded" in log.read_text()):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate()
    assert process.returncode == 130, message
    assert (tmp_path / "sweep" / "tiny_llama_base-slow-work" / "run.json").exists()
    done = sweep(changes)
    assert done.returncode == 0, done.stderr
    kinds = [event["event"] for event in events_of(log)]
    assert kinds.count("run_started") == 2
    assert "run_resumed" in kinds
    assert kinds[-1] == "run_finished"


def test_one_job_of_a_sweep(sweep, tmp_path):
    done = sweep({}, "--only", 1)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()] == ["tiny_llama_base-rtn"]
    assert not (tmp_path / "sweep" / "summary.json").exists()
    assert sweep({}, "--only", 5).returncode == 1


@pytest.mark.parametrize("changes, named", [
    ({"models": []}, "models"),
    ({"output": ""}, "output"),
    ({"recipes": [{"name": "x"}]}, "recipe"),
    ({"recipes": [{"recipe": "r.json", "sett": {}}]}, "sett"),
    ({"recipes": [{"recipe": "a/r.json"}, {"recipe": "b/r.json"}]}, "two jobs"),
    ({"recipes": [{"recipe": "r.json", "name": "../../x"}]}, "../../x"),
    ({"text": "both"}, "exclude"),
])
def test_a_wrong_sweep_is_named(sweep, tmp_path, changes, named):
    done = sweep(changes)
    assert done.returncode == 1
    assert named in done.stderr
    assert "sweep.json" in done.stderr
    assert not (tmp_path / "sweep").exists()
