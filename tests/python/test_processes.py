"""Several processes on the same files, and signals: nobody loses what is his, and nothing is left lying about."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from test_faults import ENVIRONMENT, command, model  # noqa: F401  fixtures
from test_resume import files
from tiny_runs import ROUND, RTN, TINY, recipe_of


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def wait_for(process: subprocess.Popen, line: str) -> str:
    """Reads what the process says up to a line that holds `line`."""
    said = ""
    while line not in said:
        text = process.stderr.readline()
        assert text, said
        said += text
    return said


@contextmanager
def in_the_middle(command: list[str]):
    """The process of `command`, stopped behind its first block; after the with block it has ended well."""
    process = start(command)
    wait_for(process, "block 1/")
    process.send_signal(signal.SIGSTOP)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        message = process.communicate()[1]
    assert process.returncode == 0, message


def without_work(command: list[str]) -> list[str]:
    at = command.index("--work")
    return command[:at] + command[at + 2:]


def one_line(text: str) -> bool:
    return len(text.strip().splitlines()) == 1


@pytest.fixture
def alone(command, tmp_path) -> dict[str, bytes]:
    """The files of a run that nobody disturbed."""
    subprocess.run(command(tmp_path / "alone", tmp_path / "work-alone"), check=True, capture_output=True, env=ENVIRONMENT)
    return files(tmp_path / "alone")


def test_a_second_process_on_one_work_directory_is_refused_and_the_first_ends_as_if_alone(command, run, alone, tmp_path):
    first = command(tmp_path / "out", tmp_path / "work")
    with in_the_middle(first):
        before = sorted(tmp_path.rglob("*"))
        for second in (["quantize", "--resume", tmp_path / "work"], [*first[1:], "--force"],
                       command(tmp_path / "other", tmp_path / "work")[1:]):
            done = run(*second)
            assert done.returncode == 1
            assert "another process" in done.stderr
        done = run("quantize", "--resume", tmp_path / "work")
        assert one_line(done.stderr) and f"{tmp_path / 'work'}: another process works in this" in done.stderr
        assert sorted(tmp_path.rglob("*")) == before
    assert files(tmp_path / "out") == alone


@pytest.mark.parametrize("work", [True, False], ids=["with work", "without"])
def test_a_second_process_on_one_output_is_refused_and_the_first_ends_as_if_alone(command, run, alone, tmp_path, work):
    first, second = command(tmp_path / "out", tmp_path / "work"), command(tmp_path / "out", tmp_path / "work-2")
    if not work:
        first, second = without_work(first), without_work(second)
    with in_the_middle(first):
        before = sorted(tmp_path.rglob("*"))
        for options in ([], ["--force"], ["--dry-run"]):
            done = run(*second[1:], *options)
            assert done.returncode == 1
            assert one_line(done.stderr) and "another process writes to" in done.stderr and "out.partial" in done.stderr
        assert sorted(tmp_path.rglob("*")) == before
    assert files(tmp_path / "out") == alone
    assert not (tmp_path / "out.partial").exists()


def test_a_partial_directory_of_somebody_else_is_not_deleted(command, run, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("years")
    for options in ([], ["--force"], ["--dry-run"]):
        done = run(*command(tmp_path / "out", tmp_path / "work")[1:], *options)
        assert done.returncode == 1
        assert "out.partial" in done.stderr and "move it away" in done.stderr
    assert (tmp_path / "out.partial" / "thesis.tex").read_text() == "years"
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda sent: sent.name)
def test_a_run_that_is_asked_to_stop_leaves_nothing_behind(command, tmp_path, sent):
    before = set(tmp_path.iterdir())
    process = start(without_work(command(tmp_path / "out", tmp_path / "work")))
    wait_for(process, "block 1/")
    assert (tmp_path / "out.partial").is_dir()
    process.send_signal(sent)
    message = process.communicate()[1]
    assert process.returncode == 130
    assert "stopped in block 2 of 2; without a work directory nothing is kept" in message and "--resume" not in message
    assert set(tmp_path.iterdir()) == before


class FullPipe:
    """A log for --log-json that holds up its writer: a pipe that is read until the first block is done, then filled."""

    def __init__(self, path: Path):
        os.mkfifo(path)
        self.pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)  # both ends: it has room before the writer comes
        fcntl.fcntl(self.pipe, fcntl.F_SETPIPE_SZ, 4096)

    def hold_up(self, process: subprocess.Popen) -> None:
        said = b""
        while b'"block_finished"' not in said:
            assert process.poll() is None, process.stderr.read()
            with suppress(BlockingIOError):
                said += os.read(self.pipe, 4096)
            time.sleep(0.001)
        for size in (1024, 1):
            with suppress(BlockingIOError):
                while True:
                    os.write(self.pipe, b" " * size)
        # Until it sleeps in the system call: a process that works takes time.
        before, still = None, 0
        while still < 10:
            time.sleep(0.03)
            now = stat_of(process)
            still = still + 1 if now == before and now[0] == "S" else 0
            before = now

    def close(self) -> None:
        os.close(self.pipe)


def stat_of(process: subprocess.Popen) -> tuple[str, ...]:
    """State, user time and system time."""
    parts = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return parts[0], parts[11], parts[12]


def catches(process: subprocess.Popen, sent: signal.Signals) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(caught >> (sent - 1) & 1)


@pytest.mark.parametrize("work", [True, False], ids=["with work", "without"])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM], ids=lambda sent: sent.name)
def test_a_second_ctrl_c_ends_a_run_at_once_and_the_next_run_clears_up(command, run, alone, tmp_path, work, second):
    whole = command(tmp_path / "out", tmp_path / "work")
    if not work:
        whole = without_work(whole)
    log = FullPipe(tmp_path / "log")
    before = set(tmp_path.iterdir())
    process = start([*whole, "--log-json", str(tmp_path / "log")])
    log.hold_up(process)
    process.send_signal(signal.SIGINT)
    while catches(process, second):
        time.sleep(0.01)
    time.sleep(0.1)
    assert process.poll() is None  # the first one waits for the end of a step, which does not come
    process.send_signal(second)
    assert process.wait(timeout=60) == -second
    process.communicate()
    log.close()
    assert set(tmp_path.iterdir()) - before == {tmp_path / name for name in ["out.partial", "work"][: 1 + work]}
    assert (tmp_path / "out.partial" / ".baseq-partial").exists()
    done = run("quantize", "--resume", tmp_path / "work") if work else run(*whole[1:])
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "out") == alone
    assert not (tmp_path / "out.partial").exists()


def test_a_run_that_nobody_listens_to_any_more_leaves_nothing_behind(command, tmp_path):
    before = set(tmp_path.iterdir())
    process = start(without_work(command(tmp_path / "out", tmp_path / "work")))
    process.stderr.readline()
    process.stderr.close()  # as `2>&1 | head -1` does
    assert process.wait() != 0
    assert set(tmp_path.iterdir()) == before


def test_a_closed_terminal_is_an_interrupt_that_can_be_resumed(command, run, alone, tmp_path):
    process = start(command(tmp_path / "out", tmp_path / "work"))
    wait_for(process, "block 1/")
    process.send_signal(signal.SIGHUP)
    assert "--resume" in process.communicate()[1]
    assert process.returncode == 130
    assert run("quantize", "--resume", tmp_path / "work").returncode == 0
    assert files(tmp_path / "out") == alone


def test_nohup_keeps_a_run_alive(command, tmp_path):
    process = start(["nohup", *without_work(command(tmp_path / "out", tmp_path / "work"))])
    wait_for(process, "block 1/")
    process.send_signal(signal.SIGHUP)
    message = process.communicate()[1]
    assert process.returncode == 0, message


def test_resuming_a_finished_run_says_so(command, run, alone, tmp_path):
    done = run("quantize", "--resume", tmp_path / "work-alone")
    assert done.returncode == 1
    assert one_line(done.stderr) and "--force" not in done.stderr
    assert "alone exists" in done.stderr and "no longer needed" in done.stderr
    shutil.move(tmp_path / "alone", tmp_path / "moved")
    assert run("quantize", "--resume", tmp_path / "work-alone").returncode == 0
    assert files(tmp_path / "alone") == alone


def test_a_work_directory_and_an_output_in_one_another_are_refused_before_the_run(command, run, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    for output, work in [("out", "out/work"), ("work/out", "work"), ("same", "same"), ("out", "out.partial/work"),
                         ("link/out", "out/work"), ("out", "model/work"), ("out", "link/model")]:
        done = run(*command(tmp_path / output, tmp_path / work)[1:])
        assert done.returncode == 1, (output, work)
        assert "lie in one another" in done.stderr or "the model" in done.stderr, done.stderr
        assert {path.name for path in tmp_path.iterdir()} == {"link", "model", "ids.safetensors"}


# What stands for a model and for an output that would take it away; all of it in a directory "par" that looks like one.
PLACES = [("par/m", "par/m"), ("par/m", "par"), ("par/m", "par/m/sub"), ("par/m", "link"), ("link", "par/m"),
          ("link", "par/../par/m/sub"), ("par/m/", "par/m/."), ("linked", "par/m")]


@pytest.fixture
def places(tmp_path) -> Path:
    place = tmp_path / "place"
    (place / "par").mkdir(parents=True)
    shutil.copytree(TINY, place / "par" / "m")
    (place / "par" / "config.json").write_text("{}")
    (place / "link").symlink_to("par/m")
    (place / "linked").mkdir()
    for path in (place / "par" / "m").iterdir():
        (place / "linked" / path.name).symlink_to(path)
    return place


def content(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.mark.parametrize("source, output", PLACES)
def test_the_source_is_never_touched(run, places, tmp_path, source, output):
    (tmp_path / "recipe.json").write_text(json.dumps(RTN))
    before = content(places)
    for command in (["quantize", f"{places}/{source}", "--recipe", tmp_path / "recipe.json"],
                    ["export", f"{places}/{source}", "--format", "hf"]):
        for options in ([], ["--force"], ["--force", "--dry-run"]):
            done = run(*command, "--output", f"{places}/{output}", *options)
            assert done.returncode == 1, (command, options)
            assert "choose another output" in done.stderr
            assert content(places) == before


def test_a_gguf_file_is_not_replaced_by_its_own_export(run, quantize, model_with_tokenizer, tmp_path):
    quantize(recipe_of(ROUND, weights={"num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": "float16"}),
             tmp_path / "native", model=model_with_tokenizer)
    gguf = tmp_path / "models" / "m.gguf"
    gguf.parent.mkdir()
    done = run("export", tmp_path / "native", "--format", "gguf", "--gguf-type", "F16", "--output", gguf)
    assert done.returncode == 0, done.stderr
    (gguf.parent / "config.json").write_text("{}")
    shutil.copy(model_with_tokenizer / "tokenizer.json", gguf.parent)  # a GGUF export needs one
    (tmp_path / "link.gguf").symlink_to(gguf)
    before = content(gguf.parent)
    for output in (gguf, tmp_path / "link.gguf", gguf.parent):
        for options in ([], ["--force"], ["--force", "--dry-run"]):
            for name in ("gguf", "hf"):
                kind = ["--gguf-type", "F16"] if name == "gguf" else []
                done = run("export", gguf, "--format", name, *kind, "--output", output, *options)
                assert done.returncode == 1
                assert "choose another output" in done.stderr
    assert content(gguf.parent) == before
    done = run("export", tmp_path / "native", "--format", "gguf", "--gguf-type", "F16", "--force", "--output",
               tmp_path / "native" / "model.safetensors")
    assert done.returncode == 1 and "lies in the model" in done.stderr


def test_force_removes_nothing_but_checkpoints(run, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(RTN))
    arguments = ["quantize", TINY, "--recipe", tmp_path / "recipe.json", "--output", tmp_path / "out"]
    assert run(*arguments).returncode == 0
    assert run(*arguments, "--force").returncode == 0
    (tmp_path / "out" / "notes.md").write_text("mine")
    for options in (["--force"], ["--force", "--dry-run"]):
        done = run(*arguments, *options)
        assert done.returncode == 1
        assert one_line(done.stderr) and "holds notes.md" in done.stderr and "move it away" in done.stderr
    assert (tmp_path / "out" / "notes.md").read_text() == "mine"


def test_force_replaces_what_builds_before_the_mark_quantized(run, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(RTN))
    out = tmp_path / "out"
    arguments = ["quantize", TINY, "--recipe", tmp_path / "recipe.json", "--output", out]
    assert run(*arguments).returncode == 0
    expected, weights = files(out), out / "model.safetensors"
    save_file(load_file(weights), weights, {"format": "pt"})
    assert weights.read_bytes() != expected["model.safetensors"]
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    done = run(*arguments, "--force")
    assert done.returncode == 1 and "not a result that baseq wrote" in done.stderr
    (out / "config.json").write_text(json.dumps(config))
    assert run(*arguments, "--force", "--dry-run").returncode == 0
    done = run(*arguments, "--force")
    assert done.returncode == 0, done.stderr
    assert files(out) == expected
