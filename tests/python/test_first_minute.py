"""What a new user does first: commands without options, words that are misspelled, the line about what comes next."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tiny_runs import ROUND, TINY, recipe_of

# The ffn of 96 of the tiny model has no groups of 64.
GROUPS = ["--set", "grids.weights.group_size=32", "--set", "calibration.num_samples=2", "--set", "calibration.seq_len=32"]
GRID = {"num_bits": 4, "strategy": "group", "group_size": 32}


@pytest.fixture
def here(binary, tmp_path):
    """here(*arguments, program=...) -> the completed process, in an empty folder with nothing in the cache of the Hub."""
    folder = tmp_path / "empty"
    folder.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}

    def call(*arguments, program: str | Path = binary) -> subprocess.CompletedProcess:
        return subprocess.run([Path(program).resolve(), *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=300,
                              check=False, env=environment)

    return call


def last_line(text: str) -> str:
    return text.splitlines()[-1]


def test_a_model_alone_is_quantized(here, model_with_tokenizer, tmp_path):
    done = here("quantize", model_with_tokenizer, *GROUPS)
    assert done.returncode == 0, done.stderr
    assert "no --recipe: w4-gptq" in done.stderr and "no --calibration: " in done.stderr
    output = tmp_path / "empty" / "model_with_tokenizer-w4-gptq"
    quantization = json.loads((output / "config.json").read_text())["quantization_config"]
    assert quantization["recipe"]["name"] == "w4-gptq"
    assert last_line(done.stderr).startswith("next: baseq generate model_with_tokenizer-w4-gptq ")
    for options in (["hf"], ["gptq"], ["awq"], ["compressed-tensors", "--dtype", "float16"]):
        done = here("export", output.name, "--dry-run", "--format", *options)
        assert done.returncode == 0, done.stderr
    before = (output / "config.json").read_bytes()
    done = here("quantize", model_with_tokenizer, *GROUPS)
    assert done.returncode == 1 and "exists" in done.stderr and "next:" not in done.stderr
    assert (output / "config.json").read_bytes() == before
    done = here("generate", output.name, "the", "--max-tokens", 2)
    assert done.returncode == 0 and last_line(done.stderr) == f"next: baseq bench {output.name}, its tokens a second"


def test_the_default_text_gives_what_it_gives_by_name(here, model_with_tokenizer, binary, tmp_path):
    text = Path(binary).resolve().parent / "share" / "baseq" / "calibration.txt"
    assert here("quantize", model_with_tokenizer, *GROUPS).returncode == 0
    named = ["--recipe", "w4-gptq", "--calibration", text, "--output", "named"]
    assert here("quantize", model_with_tokenizer, *named, *GROUPS).returncode == 0
    outputs = [tmp_path / "empty" / name / "model.safetensors" for name in ("model_with_tokenizer-w4-gptq", "named")]
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_the_recipe_of_a_file_names_the_output(here, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(recipe_of(ROUND, weights={"num_bits": 4})))
    done = here("quantize", TINY, "--recipe", tmp_path / "mine.json", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "empty" / "tiny_llama_base-mine" / "config.json").exists()
    done = here("quantize", TINY, "--recipe", "-")
    assert done.returncode == 2 and "--output" in done.stderr


def test_default_calibration_needs_its_text_and_a_tokenizer(here, model_with_tokenizer, binary, tmp_path):
    done = here("quantize", TINY, *GROUPS)
    assert done.returncode == 1
    assert "no tokenizer.json" in done.stderr and "--calibration FILE" in done.stderr
    (tmp_path / "bin").mkdir()
    program = shutil.copy(binary, tmp_path / "bin" / "baseq")
    done = here("quantize", model_with_tokenizer, *GROUPS, program=program)
    assert done.returncode == 1
    assert str(tmp_path / "share" / "baseq" / "calibration.txt") in done.stderr and "--calibration FILE" in done.stderr
    # An installed prefix, wherever it is.
    (tmp_path / "share" / "baseq").mkdir(parents=True)
    shutil.copy(Path(binary).parent / "share" / "baseq" / "calibration.txt", tmp_path / "share" / "baseq")
    done = here("quantize", model_with_tokenizer, *GROUPS, "--dry-run", program=program)
    assert done.returncode == 0, done.stderr
    assert last_line(done.stderr) == "next: the same command without --dry-run"


def test_quickstart_without_a_model_says_how_to_get_one(here, tmp_path):
    done = here("quickstart")
    assert (done.returncode, done.stderr) == (0, "")
    assert "hf download" in done.stdout and "baseq quickstart " in done.stdout and "Already" not in done.stdout
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / "0123abc"
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("0123abc")
    shutil.copytree(TINY, snapshot)
    assert last_line(here("quickstart").stdout) == "Already downloaded: org/tiny"


def test_quickstart_is_the_whole_tour(here, model_with_tokenizer, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(recipe_of(ROUND, weights=GRID)))
    done = here("quickstart", model_with_tokenizer, "--recipe", tmp_path / "mine.json")
    assert done.returncode == 0, done.stderr
    commands = [line.split()[2] for line in done.stdout.splitlines() if line.startswith("$ baseq ")]
    assert commands == ["quantize", "compare", "generate"]
    assert done.stdout.count("| model_with_tokenizer") == 2 and "perplexity" in done.stdout
    again = here("quickstart", model_with_tokenizer, "--recipe", tmp_path / "mine.json")
    assert again.returncode == 0 and "exists and is used as it is" in again.stdout


def test_quickstart_ends_with_the_command_that_fails(here):
    done = here("quickstart", TINY)
    assert done.returncode == 1
    assert "this command failed: baseq quantize" in last_line(done.stderr)


@pytest.mark.parametrize("arguments, meant", [
    (["quantise", "m"], "quantize"), (["quickstrat"], "quickstart"),
    (["quantize", TINY, "--calibraton", "x"], "--calibration"), (["eval", TINY, "--max-window=3"], "--max-windows"),
    (["quantize", TINY, "--recipe", "quarot-w4a16-g46"], "quarot-w4a16-g64"),
    (["quantize", TINY, "--recipe", "rtn-w8a8", "--set", "grids.weigths.num_bits=3"], '"weights"'),
    (["quantize", TINY, "--recipe", "rtn-w4a16", "--set", "steps.0.methd=gptq"], '"method"')])
def test_a_misspelled_word_is_answered_with_the_nearest(here, arguments, meant):
    done = here(*arguments)
    assert done.returncode in (1, 2)
    assert f"did you mean {meant}?" in done.stderr, done.stderr


def test_every_command_says_what_could_come_next(here, model_with_tokenizer, learned, windows, tmp_path):
    text = tmp_path / "a text.txt"
    text.write_text("the quantizer rounds a weight to its nearest step\n" * 40)
    for arguments, said in [
            (["inspect", TINY], f"baseq quantize {TINY}"), (["inspect", learned], "baseq generate "),
            (["recipes"], "baseq quantize MODEL --recipe NAME"),
            (["tokenize", model_with_tokenizer, "--text", text, "--output", "the ids.safetensors"],
             f"baseq eval {model_with_tokenizer} --tokens 'the ids.safetensors'"),
            (["eval", TINY, "--tokens", windows, "--seq-len", 48], f"baseq quantize {TINY}"),
            (["eval", learned, "--tokens", windows, "--seq-len", 48], "the same with --reference MODEL"),
            (["compare", TINY], "the same with --text FILE"), (["update", learned], "AutoModelForCausalLM"),
            (["report", learned, "--output", "page.html"], "open "),
            (["export", TINY, "--format", "hf", "--output", "hf"], 'AutoModelForCausalLM.from_pretrained("hf")'),
            (["bench", TINY, "--depth", 1, "--batch", 1, "--num-tokens", 1, "--repetitions", 1], "baseq generate ")]:
        done = here(*arguments)
        assert done.returncode == 0, done.stderr
        assert last_line(done.stderr).startswith(f"next: {said}"), done.stderr
        assert len(re.findall("^next: ", done.stderr, re.MULTILINE)) == 1
