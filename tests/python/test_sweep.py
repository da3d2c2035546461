"""Many runs from one file."""

import json
import os
import shutil
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
    settings = {"output": str(tmp_path / "sweep"), "models": [str(TINY)], "calibration": str(windows),
                "tokens": str(windows), "seq_len": 48, "originals": True,
                "recipes": [str(tmp_path / "rtn.json"),
                            {"recipe": str(tmp_path / "rtn.json"), "name": "rtn-3", "set": {"grids.weights.num_bits": 3}},
                            {"recipe": str(tmp_path / "rtn.json"), "name": "greedy",
                             "set": {"calibration.num_samples": 5000, "grids.weights": {"strategy": "group", "group_size": 7}}},
                            str(tmp_path / "learned.json")]}

    def call(changes: dict, *options):
        (tmp_path / "sweep.json").write_text(json.dumps(settings | changes))
        return run("sweep", tmp_path / "sweep.json", "--threads", 1, *options)

    return call


def summary(folder: Path) -> dict:
    return {job["name"]: job for job in json.loads((folder / "sweep" / "summary.json").read_text())["jobs"]}


NAMES = [f"tiny_llama_base{ending}" for ending in ("", "-rtn", "-rtn-3", "-greedy", "-learned")]


def test_a_failure_does_not_stop_a_sweep_and_the_next_call_continues(sweep, tmp_path):
    done = sweep({})
    assert done.returncode == 1
    assert "1 of 5 jobs failed" in done.stderr
    jobs = summary(tmp_path)
    assert list(jobs) == NAMES
    assert [job["status"] for job in jobs.values()] == ["passed", "passed", "passed", "failed", "passed"]
    # Everything that is wrong with it, not the last line alone.
    assert "problems:" in jobs[NAMES[3]]["error"] and "5000" in jobs[NAMES[3]]["error"]
    assert "grids.weights.group_size: 7 does not divide" in jobs[NAMES[3]]["error"]
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
    recipes = [str(tmp_path / "rtn.json"),
               {"recipe": str(tmp_path / "rtn.json"), "name": "rtn-3", "set": {"grids.weights.num_bits": 3}},
               {"recipe": str(tmp_path / "rtn.json"), "name": "mended"}, str(tmp_path / "learned.json")]
    done = sweep({"recipes": recipes})
    assert done.returncode == 0, done.stderr
    assert [job["status"] for job in summary(tmp_path).values()] == ["passed"] * 5
    assert {path: path.stat().st_mtime_ns for path in before} == before

    # Results of other settings are not taken for these, nor shown.
    done = sweep({"recipes": [{"recipe": str(tmp_path / "rtn.json"), "set": {"grids.weights.num_bits": 5}}], "originals": False})
    assert done.returncode == 1
    assert "other settings" in done.stderr
    job = summary(tmp_path)[NAMES[1]]
    assert job["status"] == "failed" and not {"perplexity", "model_bytes", "seconds"} & set(job)
    cells = [cell.strip() for cell in done.stdout.splitlines()[-1].strip("|").split("|")]
    assert cells == [NAMES[1], "failed", *["-"] * 6]


def test_an_interrupted_sweep_goes_on_where_it_was(sweep, binary, windows, tmp_path):
    slow = {"recipe": str(tmp_path / "learned.json"), "name": "slow", "set": {"steps.9.epochs": 60}}
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


def test_jobs_run_side_by_side_and_through_a_launcher(sweep, tmp_path):
    launcher = tmp_path / "launch"
    # Ends only when another job of the sweep has begun as well.
    launcher.write_text("#!/bin/bash\ntouch \"$1/started-$$\"; for i in {1..3000}; do\n"
                        "(( $(ls \"$1\" | grep -c started) > 1 )) && exec \"${@:2}\"; sleep 0.02; done; exit 3\n")
    launcher.chmod(0o755)
    rtn = str(tmp_path / "rtn.json")
    changes = {"recipes": [rtn, {"recipe": rtn, "name": "rtn-3", "set": {"grids.weights.num_bits": 3}}]}
    done = sweep(changes, "--parallel", 2, "--launch", f"{launcher} {tmp_path}")
    assert done.returncode == 0, done.stderr
    jobs = summary(tmp_path)
    assert list(jobs) == NAMES[:3]
    assert [job["status"] for job in jobs.values()] == ["passed"] * 3
    done = sweep(changes, "--parallel", 3, "--launch", "no-such-launcher")
    assert done.returncode == 0, "nothing is left to do"
    done = sweep({"recipes": [{"recipe": rtn, "name": "other"}], "originals": False}, "--launch", "no-such-launcher")
    assert done.returncode == 1
    assert "cannot start a process" in done.stderr


def test_an_interrupt_reaches_every_job_and_the_sweep_goes_on(sweep, binary, tmp_path):
    slow = [{"recipe": str(tmp_path / "learned.json"), "name": name, "set": {"steps.9.epochs": 60}} for name in "ab"]
    changes = {"recipes": slow, "originals": False}
    sweep(changes, "--list")
    process = subprocess.Popen([binary, "sweep", str(tmp_path / "sweep.json"), "--threads", "1", "--parallel", "2"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    logs = [tmp_path / "sweep" / f"tiny_llama_base-{name}-log.jsonl" for name in "ab"]
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not all(log.exists() and "linear_rounded" in log.read_text() for log in logs):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate()
    assert process.returncode == 130, message
    for log in logs:
        assert "run_finished" not in log.read_text()
    done = sweep(changes, "--parallel", 2)
    assert done.returncode == 0, done.stderr
    for log in logs:
        assert "run_resumed" in [event["event"] for event in events_of(log)]


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


def test_another_evaluation_keeps_what_is_quantized(sweep, tmp_path):
    changes = {"recipes": [str(tmp_path / "rtn.json")], "originals": False}
    assert sweep(changes).returncode == 0
    first = summary(tmp_path)[NAMES[1]]
    weights = tmp_path / "sweep" / NAMES[1] / "model.safetensors"
    before = weights.stat().st_mtime_ns
    done = sweep(changes | {"seq_len": 16})
    assert done.returncode == 1
    assert f"{NAMES[1]}-eval.json: belongs to another evaluation; remove it" in done.stderr
    (tmp_path / "sweep" / f"{NAMES[1]}-eval.json").unlink()
    done = sweep(changes | {"seq_len": 16})
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path)[NAMES[1]]["perplexity"] != first["perplexity"]
    assert weights.stat().st_mtime_ns == before


def test_what_is_wrong_is_found_before_the_first_job(sweep, tmp_path):
    (tmp_path / "broken.json").write_text('{"wieghts": {}}')
    rtn = str(tmp_path / "rtn.json")
    recipes = [rtn, str(tmp_path / "broken.json"), str(tmp_path / "absent.json"),
               {"recipe": rtn, "name": "x", "set": {"grids.weights.num_bits": 99}}]
    done = sweep({"models": [str(TINY), str(tmp_path / "no-model")], "recipes": recipes, "calibration": "no-text.txt"})
    assert done.returncode == 1
    for part in ("5 problems", "wieghts", "absent.json", "num_bits", "no-model", "calibration: no-text.txt"):
        assert part in done.stderr, done.stderr
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_does_not_write_into_its_models(sweep, tmp_path):
    model = tmp_path / "m"
    shutil.copytree(TINY, model)
    (tmp_path / "link").symlink_to(model)
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    for output in (model, model / "sweep", tmp_path / "link"):
        done = sweep({"models": [str(model)], "output": str(output), "recipes": [str(tmp_path / "rtn.json")]})
        assert done.returncode == 1
        assert "lies in the model" in done.stderr
        assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_a_model_whose_name_begins_with_a_dash(sweep, tmp_path, monkeypatch):
    shutil.copytree(TINY, tmp_path / "-x")
    monkeypatch.chdir(tmp_path)
    changes = {"models": ["-x"], "recipes": [str(tmp_path / "rtn.json")], "output": "-out"}
    done = sweep(changes)
    assert done.returncode == 0, done.stderr
    jobs = json.loads((tmp_path / "-out" / "summary.json").read_text())["jobs"]
    assert [job["name"] for job in jobs] == ["-x", "-x-rtn"]
    assert jobs[1]["mean_kl"] > 0


@pytest.fixture
def long_sweep(sweep, binary, tmp_path):
    """long_sweep() -> the process of a sweep that has begun to learn, its settings, and the log of its first job."""
    slow = {"recipe": str(tmp_path / "learned.json"), "name": "slow", "set": {"steps.9.epochs": 60}}
    changes = {"recipes": [slow, str(tmp_path / "rtn.json")], "originals": False}
    sweep(changes, "--list")
    process = subprocess.Popen([binary, "sweep", str(tmp_path / "sweep.json"), "--threads", "1"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    log = tmp_path / "sweep" / "tiny_llama_base-slow-log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and "linear_rounded" in log.read_text()):
        time.sleep(0.002)
    yield process, changes, log
    process.kill()
    process.wait()
    process.stderr.close()  # a test may have read it to its end


def children_of(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_children_end_with_a_sweep_that_is_killed(long_sweep, sweep):
    process, changes, log = long_sweep
    (child,) = children_of(process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "zombie" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.01)
    done = sweep(changes)
    assert done.returncode == 0, done.stderr
    assert "run_resumed" in [event["event"] for event in events_of(log)]


def test_a_second_sweep_is_refused_and_the_first_ends_as_if_alone(long_sweep, sweep, tmp_path):
    process, changes, _ = long_sweep
    (child,) = children_of(process)
    for pid in (child, process.pid):
        os.kill(pid, signal.SIGSTOP)
    for options in ([], ["--only", 0], ["--only", 1]):
        done = sweep(changes, *options)
        assert done.returncode == 1
        assert "another process works on tiny_llama_base-" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    for pid in (child, process.pid):
        os.kill(pid, signal.SIGCONT)
    _, message = process.communicate()
    assert process.returncode == 0, message
    assert [job["status"] for job in summary(tmp_path).values()] == ["passed", "passed"]
    assert not list((tmp_path / "sweep").glob(".*"))


def test_a_closed_terminal_interrupts_a_sweep(long_sweep, tmp_path):
    process, _, log = long_sweep
    process.send_signal(signal.SIGHUP)
    _, message = process.communicate()
    assert process.returncode == 130, message
    assert "run_finished" not in log.read_text()
    assert (tmp_path / "sweep" / "tiny_llama_base-slow-work" / "run.json").exists()
    assert not list((tmp_path / "sweep").glob("*.partial"))
