"""What people see of runs: the progress line, the log of events, report, compare and sweep."""

import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import time
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "data" / "tiny_llama_base"
RTN = {"name": "rtn", "weights": {"num_bits": 4}, "rounding": {"method": "rtn"}}
LEARNED = {"name": "learned", "weights": {"num_bits": 4}, "rounding": {"method": "gptq"},
           "input_activations": {"num_bits": 4, "symmetric": False, "clip": 0.9, "shift": "mean"},
           "kv_cache": {"num_bits": 4, "symmetric": False, "clip": 0.95},
           "transforms": {"residual": "hadamard", "down": "hadamard"},
           "learn_transforms": {"epochs": 2}, "learn_activations": {"epochs": 3}}
VOID = {"meta", "br"}


@pytest.fixture(scope="module")
def learned(quantize, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("learned") / "out"
    quantize(LEARNED, output)
    return output


def events_of(path: Path) -> list[dict]:
    lines = path.read_text().splitlines()
    assert path.read_bytes().endswith(b"\n")
    return [json.loads(line) for line in lines]


# --- progress and events


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
    recipe.write_text(json.dumps(LEARNED | {"learn_activations": {"epochs": 40},
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


# --- report


class Page(HTMLParser):
    """Text and structure of a page; fails on tags that do not match."""

    def __init__(self, text: str):
        super().__init__()
        self.stack, self.tags, self.texts, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1] == tag, (tag, self.stack[-3:])
        self.stack.pop()

    def handle_data(self, data):
        if not (self.stack and self.stack[-1] == "style"):
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return "\n".join(text for text in self.texts if text)


def report_of(run, checkpoint: Path, page: Path, *options) -> Page:
    done = run("report", checkpoint, "--output", page, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(page)
    return Page(page.read_text(encoding="utf-8"))


def test_report_shows_what_happened(run, evaluate, learned, tmp_path):
    results = tmp_path / "results.json"
    result = evaluate(learned, "--reference", TINY)
    results.write_text(json.dumps(result))
    page = report_of(run, learned, tmp_path / "page.html", "--results", results)
    for heading in ("Evaluation", "Blocks", "Linears", "Activation ranges", "Clips, gains and shifts", "Recipe"):
        assert heading in page.texts
    assert "tiny_llama_base" in page.texts
    assert "LlamaForCausalLM" in page.texts
    assert "4 windows of 48 tokens" in page.texts
    assert f"{result['perplexity']:.4f}" in page.texts
    assert f"{result['mean_kl']:.5f}" in page.texts
    events = events_of(learned / "quantization_log.jsonl")

    def show(value):
        return f"{value:.3e}" if abs(value) < 1e-3 or abs(value) >= 1e4 else f"{value:.4f}"

    for event in events:
        if event["event"] == "linear_rounded":
            assert show(event["relative_error"]) in page.texts
        if event["event"] == "stage_learned":
            assert show(event["loss_before"]) in page.texts
            assert show(event["loss_after"]) in page.texts
        if event["event"] == "block_finished":
            assert show(event["relative_error"]) in page.texts
        if event["event"] == "point_measured":
            assert f"{event['before']['peak']:.2f}" in page.texts
            assert f"{event['after']['max']:.4g}" in page.texts
            assert f"{event['clip'][0]:.3f}" in page.text
    assert json.loads(next(text for text in page.texts if text.startswith("{")))["name"] == "learned"
    # One chart of errors, one a stage, one heat map, one a quant point, one of clips.
    assert page.tags.count("svg") == 1 + 2 + 1 + 6 + 1
    # Nothing is fetched and nothing runs.
    assert not {"script", "link", "img", "iframe", "a"} & set(page.tags)
    assert not {name for name, _ in page.attributes if name in ("src", "href") or name.startswith("on")}
    assert "url(" not in (tmp_path / "page.html").read_text()


def test_report_finds_results_beside_the_checkpoint(run, quantize, windows, tmp_path):
    output = tmp_path / "out"
    quantize(RTN, output)
    done = run("eval", output, "--tokens", windows, "--seq-len", 48, "--json", tmp_path / "out-eval.json", "--quiet")
    assert done.returncode == 0, done.stderr
    (tmp_path / "out-broken.json").write_text("{")
    (tmp_path / "out-other.json").write_text(json.dumps({"model": "elsewhere", "perplexity": 12345.678}))
    done = run("report", output)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "out-report.html")
    page = Page((tmp_path / "out-report.html").read_text())
    assert f"{json.loads((tmp_path / 'out-eval.json').read_text())['perplexity']:.4f}" in page.texts
    assert "12345.6780" not in page.texts
    done = run("report", output, "--results", tmp_path / "out-broken.json")
    assert done.returncode == 1
    assert "out-broken.json" in done.stderr


def test_report_escapes_what_comes_from_files(run, learned, tmp_path):
    hostile = "<script>alert('1')</script>&\"]]>"
    checkpoint = tmp_path / "a<b>&c"
    shutil.copytree(learned, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["recipe"]["name"] = hostile
    (checkpoint / "config.json").write_text(json.dumps(config))
    log = checkpoint / "quantization_log.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    for event in events:
        for key in ("name", "stage", "model", "device"):
            if key in event:
                event[key] = hostile + event[key]
    # Numbers that no run has.
    events += [{"event": "block_finished", "block": 10**18, "num_blocks": 1, "relative_error": 1e308, "seconds": 1e300},
               {"event": "block_finished", "block": -5, "num_blocks": 1, "relative_error": -1e29, "seconds": None},
               {"event": "warning", "message": hostile}, {"event": "of a later version"}]
    log.write_text("".join(json.dumps(event) + "\n" for event in events))
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"model": hostile, "perplexity": "many", "seq_len": [hostile], "mean_kl": {}}))
    page = report_of(run, checkpoint, tmp_path / "page.html", "--results", results)
    assert "script" not in page.tags
    assert page.text.count("<script>alert('1')</script>") > 10
    assert "a<b>&c" in page.texts


def test_report_of_a_checkpoint_without_a_log(run, learned, tmp_path):
    checkpoint = tmp_path / "out"
    shutil.copytree(learned, checkpoint)
    (checkpoint / "quantization_log.jsonl").unlink()
    page = report_of(run, checkpoint, tmp_path / "page.html")
    assert "quantization_log.jsonl" in page.text
    assert "Recipe" in page.texts
    page = report_of(run, TINY, tmp_path / "page.html", "--log", learned / "quantization_log.jsonl")
    assert "Linears" in page.texts


def pixels_of(png: bytes) -> tuple[int, int, list[bytes]]:
    """Width, height and rows of an 8-bit RGB or RGBA file, filters undone."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    at, data, header = 8, b"", b""
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at: at + 8])
        if kind == b"IHDR":
            header = png[at + 8: at + 8 + length]
        if kind == b"IDAT":
            data += png[at + 8: at + 8 + length]
        at += 12 + length
    width, height, depth, color = struct.unpack(">IIBB", header[:10])
    assert depth == 8 and color in (2, 6)
    size, stride, raw = (3 if color == 2 else 4), 0, zlib.decompress(data)
    stride = size * width
    rows, previous = [], bytearray(stride)
    for y in range(height):
        kind, row = raw[y * (stride + 1)], bytearray(raw[y * (stride + 1) + 1: (y + 1) * (stride + 1)])
        for x in range(stride if kind else 0):
            left, up = (row[x - size] if x >= size else 0), previous[x]
            corner = previous[x - size] if x >= size else 0
            if kind == 1:
                guess = left
            elif kind == 2:
                guess = up
            elif kind == 3:
                guess = (left + up) // 2
            else:
                guess = min((left, up, corner), key=lambda value, p=left + up - corner: abs(p - value))
            row[x] = (row[x] + guess) & 255
        rows.append(bytes(row[x + c] for x in range(0, stride, size) for c in range(3)))
        previous = row
    return width, height, rows


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="NO CHROMIUM: how the report looks is not tested (apt-get install chromium)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_is_drawn_by_a_browser(run, learned, tmp_path, scheme):
    page, shot = tmp_path / "page.html", tmp_path / "page.png"
    report_of(run, learned, page)
    flags = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=700,900",
                           f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", *flags, page.as_uri()],
                          capture_output=True, text=True, timeout=120, check=False)
    assert shot.exists(), done.stderr
    width, height, rows = pixels_of(shot.read_bytes())
    assert (width, height) == (700, 900)
    corner = rows[0][:3]
    assert sum(corner) > 700 if scheme == "light" else sum(corner) < 100
    # Text, cards and the first chart down the page: rows that are not all of the page's color, in every quarter.
    drawn = [row != corner * width for row in rows]
    assert all(sum(drawn[start: start + 225]) > 60 for start in range(0, 900, 225))
    # The line of the first chart has the color of the first series.
    series = bytes.fromhex("1f5fbf" if scheme == "light" else "7fb0ff")
    assert any(row[x: x + 3] == series for row in rows for x in range(0, len(row), 3))


# --- compare


def bits_per_weight(checkpoint: Path) -> float:
    bits = weights = 0
    for name, array in load_file(checkpoint / "model.safetensors").items():
        if name.startswith("model.layers.") and "proj.weight" in name:
            if name.endswith("weight_shape"):
                weights += int(array[0]) * int(array[1])
            else:
                bits += 8 * array.nbytes
                weights += array.size if name.endswith(".weight") else 0
    return bits / weights


def test_compare_is_one_table_of_several_checkpoints(run, quantize, evaluate, windows, learned, tmp_path):
    grouped = tmp_path / "grouped"
    quantize(RTN | {"name": "a|b", "weights": {"num_bits": 3, "symmetric": False, "strategy": "group", "group_size": 16}}, grouped)
    done = run("compare", TINY, learned, grouped, "--tokens", windows, "--seq-len", 48, "--reference", TINY, "--json",
               tmp_path / "table.json", "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    models = json.loads((tmp_path / "table.json").read_text())["models"]
    assert [model["name"] for model in models] == ["tiny_llama_base", "out", "grouped"]
    assert [model["recipe"] for model in models] == [None, "learned", "a|b"]
    for model, path in zip(models, (TINY, learned, grouped), strict=True):
        assert model["bits_per_weight"] == pytest.approx(bits_per_weight(path))
        expected = evaluate(path, "--reference", TINY)
        for key in ("perplexity", "mean_kl", "top1_agreement", "model_bytes", "num_tokens"):
            assert model[key] == expected[key]
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    assert len({len(line) for line in lines}) == 1
    assert "3 bits, asymmetric, per group of 16" in lines[4]
    assert "a\\|b" in lines[4]
    assert f"{models[1]['perplexity']:.4f}" in lines[3]


def test_compare_without_a_text_reads_headers_only(run, learned, tmp_path):
    done = run("compare", TINY, learned)
    assert done.returncode == 0, done.stderr
    assert "perplexity" not in done.stdout
    assert run("compare", TINY, "--reference", TINY).returncode == 2
    assert run("compare").returncode == 2


# --- sweep


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
    while time.monotonic() < deadline and not log.exists():
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
