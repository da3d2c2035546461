"""What people see of a run: the progress line and the log of events."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import time

from tiny_runs import LEARNED, RTN, TINY, events_of


def test_progress_line_shows_block_stage_loss_time_and_memory(binary, windows, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(LEARNED | {"calibration": {"num_samples": 4, "seq_len": 48}}))
    terminal, stderr = pty.openpty()
    process = subprocess.Popen([binary, "quantize", str(TINY), "--recipe", str(recipe), "--calibration", str(windows),
                                "--output", str(tmp_path / "out"), "--threads", "1"], stdout=subprocess.DEVNULL,
                               stderr=stderr)
    os.close(stderr)
    shown = b""
    while True:
        select.select([terminal], [], [], 60)
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    assert process.wait() == 0
    lines = shown.decode().split("\r")
    drawn = [line for line in lines if "\x1b[K[" in line]
    assert any(re.search(r"1/2 blocks +[\d.:]+ (s|min) left +[\d.]+ [KMG]iB +activations 2/3, loss \d\.\d{3}e[+-]\d\d", line)
               for line in drawn), drawn
    assert all(len(line.split("\x1b[K")[-1].split("\n")[0]) < 80 for line in drawn)
    # Nothing scrolls by: a linear is named in that line alone, until the table at the end.
    printed = re.sub(r"\r\x1b\[K\[[^\r]*", "", shown.decode()).replace("\r\x1b[K", "").splitlines()
    printed = [line for line in printed if line and "calibration: " not in line]
    assert printed[0].startswith("tiny_llama_base: 2 blocks") and printed[1].split()[:2] == ["relative", "error"]
    assert [line.split()[0] for line in printed[2:9]] == [
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
        "mlp.down_proj"]
    assert all(len(line) < 80 for line in printed[:10])
    assert printed[9].startswith("residual stream") and printed[10].startswith("next: ")


def test_every_event_is_one_line_of_the_log(run, windows, tmp_path):
    recipe, log = tmp_path / "recipe.json", tmp_path / "log.jsonl"
    recipe.write_text(json.dumps(LEARNED | {"calibration": {"num_samples": 4, "seq_len": 48}}))
    log.write_text('{"event": "warning", "message": "of another run"}\n{"event": "warn')  # cut off by a full disk
    done = run("quantize", TINY, "--recipe", recipe, "--calibration", windows, "--output", tmp_path / "out", "--log-json", log)
    assert done.returncode == 0, done.stderr
    events = events_of(log)
    assert events[0]["message"] == "of another run"
    events = events[1:]
    assert [event["event"] for event in events[:2]] == ["run_started", "block_started"]
    assert events[-1]["event"] == "run_finished"
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event["time"]) for event in events)
    kinds = [event["event"] for event in events]
    assert kinds.count("linear_rounded") == 14
    assert kinds.count("stage_learned") == 4
    assert kinds.count("epoch_learned") == 2 * (2 + 3)
    assert kinds.count("point_measured") == 12
    assert kinds.count("block_finished") == 2
    # The checkpoint keeps the same events.
    kept = events_of(tmp_path / "out" / "quantization_log.jsonl")
    assert kept == [{key: value for key, value in event.items() if key != "time"} for event in events[:-1]]


def test_log_of_something_else_is_not_touched(run, windows, tmp_path):
    recipe, other = tmp_path / "recipe.json", tmp_path / "other.txt"
    recipe.write_text(json.dumps(RTN))
    other.write_text("precious")
    done = run("quantize", TINY, "--recipe", recipe, "--output", tmp_path / "out", "--log-json", other)
    assert done.returncode == 1
    assert "other.txt" in done.stderr
    assert other.read_text() == "precious"
    done = run("quantize", TINY, "--recipe", recipe, "--output", tmp_path / "out", "--log-json", "/dev/full")
    assert done.returncode == 0, done.stderr
    assert "/dev/full" in done.stderr


def test_log_survives_a_kill_and_is_continued(binary, run, windows, tmp_path):
    recipe, log, work = tmp_path / "recipe.json", tmp_path / "log.jsonl", tmp_path / "work"
    recipe.write_text(json.dumps(LEARNED | {"steps": [*LEARNED["steps"][:-1], LEARNED["steps"][-1] | {"epochs": 40}],
                                            "calibration": {"num_samples": 4, "seq_len": 48}}))
    command = [binary, "quantize", str(TINY), "--recipe", str(recipe), "--calibration", str(windows), "--output",
               str(tmp_path / "out"), "--work", str(work), "--log-json", str(log), "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and b'"block":1,' in log.read_bytes()):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = events_of(log)
    done = run("quantize", "--resume", work, "--log-json", log, "--json", tmp_path / "results.json")
    assert done.returncode == 0, done.stderr
    after = events_of(log)
    assert after[: len(before)] == before
    if process.returncode == -signal.SIGKILL:
        assert "run_resumed" in [event["event"] for event in after[len(before):]]
    # Blocks that the killed process finished are in the checkpoint's log and in the results.
    kept = events_of(tmp_path / "out" / "quantization_log.jsonl")
    assert [event["block"] for event in kept if event["event"] == "block_finished"] == [0, 1]
    assert len([event for event in kept if event["event"] == "linear_rounded"]) == 14
    assert [len(block["linears"]) for block in json.loads((tmp_path / "results.json").read_text())["blocks"]] == [7, 7]
