"""Where results go: pipes, links, standard streams, files of others.

No test names a device as an output: a program that renames its outputs into place would replace the device."""

import json
import os
import pty
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, load_file, save_file

from tiny_runs import ROUND, RTN, TINY, recipe_of

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "tests" / "data" / "tokenizer" / "tokenizer.json"
TEXT = "the quantizer rounds a weight to its nearest step\n" * 4


@pytest.fixture
def shell(binary):
    """shell(command line with $B for the program) -> the completed process, output as bytes."""

    def call(command: str, **options) -> subprocess.CompletedProcess:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "B": binary}
        return subprocess.run(["bash", "-c", command], capture_output=True, timeout=300, check=False, env=environment,
                              **options)

    return call


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.json"
    path.write_text(json.dumps(RTN))
    return path


def test_closed_standard_streams_end_up_in_no_file(run, shell, tmp_path, recipe):
    assert run("quantize", TINY, "--recipe", recipe, "--output", tmp_path / "whole").returncode == 0
    log = tmp_path / "log.jsonl"
    done = shell(f"$B quantize {TINY} --recipe {recipe} --output {tmp_path / 'out'} --log-json {log} <&- 2>&-")
    assert done.returncode == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert all("event" in json.loads(line) for line in log.read_text().splitlines())
    # Results that nobody can see are a failure, as for other programs.
    closed, result = tmp_path / "closed", tmp_path / "result.json"
    done = shell(f"$B quantize {TINY} --recipe {recipe} --output {closed} --json {result} >&- 2>&-")
    assert done.returncode == 1
    assert (closed / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    done = shell(f"$B inspect {TINY} >&-")
    assert done.returncode == 1
    assert b"write error on stdout: Bad file descriptor" in done.stderr


def test_results_that_cannot_be_printed_are_a_failure(shell):
    done = shell(f"$B inspect {TINY} --tensors > /dev/full")
    assert done.returncode == 1
    assert b"No space left on device" in done.stderr
    done = shell("$B --version > /dev/full")
    assert done.returncode == 1
    assert b"write error on stdout" in done.stderr
    assert shell(f"set -o pipefail; $B inspect {TINY} | exec <&-").returncode != 0


def test_pipes_links_and_stdout_take_the_results(run, shell, tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    assert run("inspect", TINY, "--json", pipe).returncode == 0
    reader.join(timeout=60)
    assert pipe.is_fifo()
    report = json.loads(got[0])
    assert report["model"] == str(TINY)

    (tmp_path / "link.json").symlink_to("real.json")
    assert run("inspect", TINY, "--json", tmp_path / "link.json").returncode == 0
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text()) == report

    done = run("inspect", TINY, "--json", "-")
    assert json.loads(done.stdout) == report
    assert not Path("-").exists()
    # Where stdout is a file, what is in it stays.
    done = shell(f"echo before > {tmp_path / 'all'}; $B inspect {TINY} --json - >> {tmp_path / 'all'}")
    assert done.returncode == 0, done.stderr
    before, after = (tmp_path / "all").read_text().split("\n", 1)
    assert before == "before" and json.loads(after) == report
    done = shell(f"$B tokenize {TOKENIZER} --text - --output - --seq-len 8", input=TEXT.encode())
    assert done.returncode == 0, done.stderr
    assert load(done.stdout)["input_ids"].shape[1] == 8


def test_files_of_others_are_not_overwritten(run, learned, windows, recipe, tmp_path):
    model = shutil.copytree(learned, tmp_path / "model")
    text, tokens, page = tmp_path / "text.txt", tmp_path / "tokens.safetensors", tmp_path / "model-report.html"
    text.write_text(TEXT)
    page.write_text("<html>mine</html>")
    save_file({"input_ids": np.arange(64, dtype=np.int32)}, tokens)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for arguments in (["tokenize", TOKENIZER, "--text", text, "--output", text],
                      ["tokenize", TOKENIZER, "--text", text, "--output", tokens],
                      ["inspect", model, "--json", model / "config.json"],
                      ["eval", model, "--tokens", windows, "--seq-len", 8, "--logits", model / "model.safetensors"],
                      ["report", model],
                      ["quantize", TINY, "--recipe", recipe, "--output", tmp_path / "out",
                       "--log-json", model / "config.json"]):
        done = run(*arguments)
        assert done.returncode == 1
        assert "not a result that baseq wrote" in done.stderr, done.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_earlier_results_are_replaced(run, learned, windows, tmp_path):
    text, ids, logits = tmp_path / "text.txt", tmp_path / "ids.safetensors", tmp_path / "logits.safetensors"
    text.write_text(TEXT)
    result = ["--json", tmp_path / "result.json"]
    for _ in range(2):
        for arguments in (["tokenize", TOKENIZER, "--text", text, "--output", ids, *result],
                          ["eval", TINY, "--tokens", windows, "--seq-len", 8, "--logits", logits, *result],
                          ["report", learned, "--output", tmp_path / "page.html"]):
            done = run(*arguments)
            assert done.returncode == 0, done.stderr
    # Of one kind each: ids are an input elsewhere.
    done = run("eval", TINY, "--tokens", windows, "--seq-len", 8, "--logits", ids)
    assert done.returncode == 1
    assert load_file(ids)["input_ids"].ndim == 1


def test_output_paths_are_checked_before_the_work(run, windows, recipe, tmp_path):
    missing = tmp_path / "no" / "e.json"
    done = run("eval", TINY, "--tokens", windows, "--seq-len", 8, "--json", missing, "--logits", tmp_path)
    assert done.returncode == 1
    assert f"--json: cannot write {missing}: No such file or directory" in done.stderr
    assert f"--logits: cannot write {tmp_path}: Is a directory" in done.stderr
    assert "perplexity" not in done.stdout
    done = run("quantize", TINY, "--recipe", recipe, "--output", tmp_path / "out", "--json", missing, "--log-json",
               tmp_path / "log", "--set", "grids.weights.num_bits=9")
    assert done.returncode == 1
    assert "2 problems" in done.stderr and "num_bits" in done.stderr and str(missing) in done.stderr
    same = ["--json", tmp_path / "a", "--logits", f"{tmp_path}/./a"]
    done = run("eval", TINY, "--tokens", windows, "--seq-len", 8, *same)
    assert done.returncode == 1
    assert "--json and --logits both write to" in done.stderr
    assert os.listdir(tmp_path) == []


def test_sweep_does_not_overwrite_files_of_others(run, tmp_path):
    plan = tmp_path / "sweep.json"
    plan.write_text(json.dumps({"output": str(tmp_path), "models": [str(TINY)], "recipes": [], "originals": True}))
    (tmp_path / "summary.md").write_text("mine")
    done = run("sweep", plan)
    assert done.returncode == 1
    assert "summary.md" in done.stderr and (tmp_path / "summary.md").read_text() == "mine"
    (tmp_path / "summary.md").unlink()
    for _ in range(2):
        assert run("sweep", plan).returncode == 0
    assert (tmp_path / "summary.md").read_text().startswith("| job")


def test_gguf_file_of_others_is_not_replaced_even_by_force(run, round_off, model_with_tokenizer, tmp_path):
    native, output = tmp_path / "native", tmp_path / "out.gguf"
    grid = {"num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": "float16"}
    round_off(recipe_of(ROUND, weights=grid), native, model_with_tokenizer)
    command = ["export", native, "--format", "gguf", "--output", output, "--quiet"]
    output.write_bytes(b"GGUF of another program")
    done = run(*command, "--force")
    assert done.returncode == 1
    assert "not a result that baseq wrote" in done.stderr
    assert output.read_bytes() == b"GGUF of another program"
    output.unlink()
    # Not written through either.
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "out.gguf.baseq.tmp").symlink_to("victim")
    assert run(*command).returncode == 0
    assert (tmp_path / "victim").read_text() == "mine"
    first = output.read_bytes()
    assert run(*command).returncode == 1
    assert run(*command, "--force").returncode == 0
    assert output.read_bytes() == first


@pytest.mark.parametrize("option, value, said", [
    ("--memory", "0", "8G"),
    ("--memory", "-1", "8G"),
    ("--device", "gpu", "expected cpu, cuda"),
])
def test_numbers_that_are_none_are_refused(run, windows, option, value, said):
    done = run("eval", TINY, "--tokens", windows, option, value)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.parametrize("seed", ["-1", "99999999999999999999999"])
def test_seeds_that_are_none_are_refused(run, seed):
    done = run("quantize", TINY, "--seed", seed)
    assert done.returncode == 2
    assert "integer from 0" in done.stderr


def test_memory_takes_fractions(run, windows, tmp_path):
    done = run("eval", TINY, "--tokens", windows, "--seq-len", 8, "--memory", "1.5G")
    assert done.returncode == 0, done.stderr
    assert "1536.0 MiB" in done.stderr


@pytest.mark.parametrize("arguments, meant", [
    (["quantise", TINY], "quantize"),
    (["eval", TINY, "--token", "x"], "--tokens"),
    (["tokenize", TINY, "--txt=x"], "--text"),
])
def test_misspelled_words_are_recognised(run, arguments, meant):
    done = run(*arguments)
    assert done.returncode == 2
    assert f"did you mean {meant}?" in done.stderr


def test_models_that_are_files_or_quantized_by_others_are_refused_in_plain_words(run, recipe, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    done = run("quantize", tmp_path / "x.gguf", "--recipe", recipe, "--output", tmp_path / "out")
    assert done.returncode == 2
    assert "x.gguf is a file" in done.stderr and "download" not in done.stderr


def test_eval_beyond_the_context_of_the_model_is_warned_of(run, tmp_path):
    save_file({"ids": np.zeros(130, np.int32)}, tmp_path / "ids.safetensors")
    done = run("eval", TINY, "--tokens", tmp_path / "ids.safetensors", "--seq-len", 65, "--quiet")
    assert done.returncode == 0, done.stderr
    assert "windows of 65 tokens, but the model was made for 64" in done.stderr
    save_file({"ids": np.full(64, 999_999, np.int32)}, tmp_path / "ids.safetensors")
    done = run("eval", TINY, "--tokens", tmp_path / "ids.safetensors", "--seq-len", 64)
    assert done.returncode == 1
    assert "ids.safetensors: token ids run from 999999" in done.stderr


def test_dumb_terminals_get_plain_lines_and_quiet_is_quiet(binary, run, recipe, tmp_path):
    controller, terminal = pty.openpty()
    command = [binary, "quantize", str(TINY), "--recipe", str(recipe), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, timeout=300, check=False,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"})
    shown = os.read(controller, 1 << 20)
    os.close(terminal)
    os.close(controller)
    assert done.returncode == 0
    assert b"block 1/2" in shown and b"\x1b" not in shown
    done = run("quantize", TINY, "--recipe", recipe, "--output", tmp_path / "quiet", "--work", tmp_path / "work",
               "--quiet")
    assert done.returncode == 0
    assert done.stderr == ""
