"""The page that `baseq report` makes of a run."""

import json
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from test_open_gptq import write as gptq_by_another_tool
from tiny_runs import RTN, TINY, events_of

VOID = {"meta", "br"}


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
    opening = page.text[: page.text.index("bits a weight")]
    assert f"Its perplexity is {result['perplexity']:.2f}" in opening and "of block" in opening
    assert "would help" in opening
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


def test_report_of_a_checkpoint_by_another_tool(run, tmp_path):
    folder = gptq_by_another_tool(tmp_path / "gptq")
    page = report_of(run, folder, tmp_path / "page.html")
    assert page.texts[page.texts.index("Quantization format") + 1] == "gptq"
    assert "4 bits, symmetric, per group of 16" in page.texts
    assert "has no quantization_log.jsonl: of its run nothing more is known" in page.text
    # One that is not read is refused for what it is, without names of the program's inside.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    done = run("report", folder, "--output", tmp_path / "none.html")
    assert done.returncode == 1
    assert 'quant_method is "bitsandbytes": the checkpoint is already quantized' in done.stderr
    assert '"gptq" and "awq" can be evaluated' in done.stderr and "open_checkpoint" not in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "none.html").exists()


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
