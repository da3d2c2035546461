"""The behaviour of the program that the README promises: exit codes, messages, reports."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tiny_runs import GPTQ, POINTS, ROUND, RTN, TINY, config_file, hadamard, recipe_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(tmp_path):
    def write(value: dict) -> Path:
        path = tmp_path / "recipe.json"
        path.write_text(json.dumps(value))
        return path

    return write


def test_version(run):
    done = run("--version")
    assert done.returncode == 0
    first, *others = done.stdout.splitlines()
    assert re.fullmatch(r"baseq \d+\.\d+\.\d+", first)
    values = dict(re.split("  +", line) for line in others)
    assert list(values) == ["LibTorch", "instruction set", "threads", "devices", "MPI"]
    assert values["LibTorch"].startswith(".".join(torch.__version__.split(".")[:2]))
    assert values["threads"] == "1"
    assert "cpu" in values["devices"].split()


def test_threads_that_wait_do_not_spin_for_long(binary, tmp_path):
    (tmp_path / "text of two words.txt").write_text("two words")
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}

    # libgomp shows its settings each time that it is loaded.
    def spin_counts(*options, **chosen) -> list[int]:
        done = subprocess.run([binary, "tokenize", TINY.parent / "tokenizer" / "tokenizer.json", "--text",
                               tmp_path / "text of two words.txt", "--output", tmp_path / "ids.safetensors", *options],
                              capture_output=True, text=True, check=False,
                              env=variables | {"OMP_DISPLAY_ENV": "VERBOSE", "OMP_NUM_THREADS": "2"} | chosen)
        assert done.returncode == 0, done.stderr
        return [int(line.split("'")[1]) for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]

    first, second = spin_counts()
    assert first > 10_000 >= second > 0
    assert len(spin_counts("--threads", "1")) == 1, "a thread alone waits for none"
    assert len(spin_counts(OMP_WAIT_POLICY="active")) == 1, "the user's choice stays"
    assert spin_counts(GOMP_SPINCOUNT="77") == [77]


COMMANDS = ["quantize", "eval", "generate", "bench", "export", "inspect", "tokenize", "report", "compare", "sweep",
            "update", "recipes", "quickstart", "card"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_readable(run, command):
    done = run(command, "--help")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[2].startswith(f"Usage: baseq {command} ")
    assert max(map(len, lines)) <= 100
    assert not re.search(r"Excludes|TEXT|INT|UINT| in \[", done.stdout)
    examples = done.stdout[done.stdout.index("\nExample"):]
    options = set(re.findall(r"^  (--[a-z-]+)", done.stdout, re.MULTILINE))
    for line in examples.splitlines()[2:]:
        assert line.startswith(f"  baseq {command}")
        assert set(re.findall(r"--[a-z-]+", line)) <= options, "an example is one that works"
    assert command in run("--help").stdout


# What a subcommand would ignore.
@pytest.mark.parametrize("command, options", [
    (["eval", TINY, "--tokens", "/dev/null"], ["--seed"]),
    (["compare", TINY], ["--seed"]),
    (["export", TINY, "--format", "hf", "--dry-run"], ["--seed", "--device"]),
    (["tokenize", TINY, "--text", "/dev/null", "--output", "/dev/null"], ["--seed", "--device", "--quiet"]),
    (["inspect", TINY], ["--seed", "--device", "--threads", "--quiet"]),
    (["report", TINY], ["--json", "--quiet"]),
    (["update", TINY], ["--json", "--force"]),
    (["recipes"], ["--quiet", "--threads"])], ids=lambda value: value[0].removeprefix("--"))
def test_a_subcommand_takes_only_options_that_it_obeys(run, command, options):
    shown = run(command[0], "--help").stdout
    for option in options:
        assert not re.search(rf"^  {option}\b", shown, re.MULTILINE)
        done = run(*command, option)
        assert (done.returncode, option in done.stderr) == (2, True)


@pytest.mark.parametrize("arguments", [
    ["export", TINY, "--format", "hf", "--gguf-type", "F16", "--dry-run"],
    ["export", TINY, "--format", "gguf", "--dtype", "float32", "--dry-run"],
    ["export", TINY, "--format", "gguf", "--shard-size", 8, "--dry-run"],
    ["eval", TINY, "--tokens", "/dev/null", "--tokenizer", TINY / "config.json"]])
def test_options_that_another_one_makes_meaningless_are_refused(run, arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert next(word for word in reversed(arguments[:-1]) if str(word).startswith("--") and word != "--dry-run") in done.stderr


@pytest.mark.parametrize("arguments", [
    [],
    ["nonsense"],
    ["quantize"],
    ["quantize", TINY, "--recipe", "no/such/file.json", "--output", "out"],
    ["eval", "no/such/directory", "--tokens", "x"],
    ["inspect", TINY, "--no-such-option"],
    ["eval", TINY, "--seq-len", "1"],
], ids=["no command", "unknown command", "missing options", "missing recipe", "missing model", "unknown option",
        "out of range"])
def test_misuse_exits_with_2(run, arguments):
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr


@pytest.mark.parametrize("change, named", [
    ({"steps": [ROUND | {"methd": "rtn"}]}, ": steps[0]: unknown key \"methd\""),
    ({"wieghts": {}}, "wieghts"),
    ({"grids": {"weights": {"num_bits": 9}}}, ": grids.weights.num_bits"),
    ({"steps": [ROUND | {"method": "magic"}]}, "magic"),
    ({"grids": {"weights": {"num_bits": 4, "strategy": "group"}}}, "group_size"),
    ({"steps": [hadamard("residual", "qkv"), ROUND]}, ": steps[0].at: \"residual\""),
    ({"steps": [ROUND, hadamard("down")]}, ": steps[1].at: the weights are rounded by then"),
    ({"steps": [POINTS | {"shifts": "mean"}, ROUND]}, "shifts"),
])
def test_wrong_recipe_is_named_and_fails(run, recipe, tmp_path, change, named):
    path = recipe(RTN | change)
    done = run("quantize", TINY, "--recipe", path, "--output", tmp_path / "out")
    assert done.returncode == 1
    assert named in done.stderr
    assert str(path) in done.stderr
    assert not (tmp_path / "out").exists()


def test_failure_is_one_line_without_a_backtrace(run, recipe, tmp_path):
    done = run("quantize", TINY, "--recipe", recipe({"wieghts": {}}), "--output", tmp_path / "out")
    assert len(done.stderr.strip().splitlines()) == 1
    assert "frame #" not in done.stderr


def test_recipe_that_is_not_json_fails(run, tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text("{")
    done = run("quantize", TINY, "--recipe", path, "--output", tmp_path / "out")
    assert done.returncode == 1
    assert str(path) in done.stderr


def test_calibration_is_asked_for(run, recipe, tmp_path):
    path = recipe(recipe_of(GPTQ, weights={"num_bits": 4}, name="mine"))
    done = run("quantize", TINY, "--recipe", path, "--output", tmp_path / "out")
    assert done.returncode == 1
    assert "--calibration" in done.stderr


def test_existing_output_needs_force(run, recipe, tmp_path):
    path, output = recipe(RTN), tmp_path / "out"
    arguments = ("quantize", TINY, "--recipe", path, "--output", output, "--quiet")
    assert run(*arguments).returncode == 0
    before = (output / "config.json").read_bytes()
    done = run(*arguments, "--set", "grids.weights.num_bits=8")
    assert done.returncode == 1
    assert "--force" in done.stderr
    assert (output / "config.json").read_bytes() == before
    assert run(*arguments, "--set", "grids.weights.num_bits=8", "--force").returncode == 0
    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"]["weights"]["num_bits"] == 8


def test_settings_reach_into_the_steps(run, recipe, tmp_path):
    arguments = ("quantize", TINY, "--recipe", recipe(RTN), "--output", tmp_path / "out", "--quiet", "--set")
    for setting, named in [("steps.1.method=rtn", "steps has 1 items"), ("steps.round.method=rtn", "number of an item"),
                           ("steps.0.method=magic", "steps[0].method")]:
        done = run(*arguments, setting)
        assert done.returncode == 1 and named in done.stderr, done.stderr
    assert run(*arguments, "steps.0.clip=none").returncode == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["recipe"]["steps"][0]["clip"] == "none"


def test_quantizing_twice_is_refused(run, recipe, tmp_path):
    path = recipe(RTN)
    assert run("quantize", TINY, "--recipe", path, "--output", tmp_path / "first").returncode == 0
    done = run("quantize", tmp_path / "first", "--recipe", path, "--output", tmp_path / "second")
    assert done.returncode == 1
    assert "already quantized" in done.stderr
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "phi3_longrope", "smollm3", "granite"])
def test_each_architecture_is_quantized_and_evaluated(run, quantize, family, tmp_path):
    model = TINY.parent / f"tiny_{family}"
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    ids = np.random.default_rng(0).integers(0, vocab_size, (4, 48), dtype=np.int32)
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    quantize(config_file("baseq-plus-w4a4kv4"), tmp_path / "out", model=model,
             calibration=tmp_path / "ids.safetensors")
    done = run("eval", tmp_path / "out", "--tokens", tmp_path / "ids.safetensors", "--seq-len", 48, "--reference", model,
               "--json", tmp_path / "eval.json", "--quiet")
    assert done.returncode == 0, done.stderr
    # Logits of order one: 4 bits leave most of them, a model put together wrongly would not.
    assert json.loads((tmp_path / "eval.json").read_text())["mean_kl"] < 0.3


@pytest.mark.parametrize("name, said", [
    ("llama_llama3", "rope llama3 by 8"),
    ("smollm3", "1 layers without, window of 9 in 1 layers"),
    ("qwen3_options", "rope yarn by 2, theta 10000, window of 9 in 1 layers, norms of q and k"),
])
def test_inspect_says_what_attention_does(run, name, said):
    done = run("inspect", TINY.parent / f"tiny_{name}")
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_model_in_the_hugging_face_cache_is_named_by_its_repository(run, tmp_path):
    folder = tmp_path / "hub" / "models--org--tiny"
    snapshot = folder / "snapshots" / "0123abc"
    for directory in (folder / "blobs", folder / "refs", snapshot):
        directory.mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123abc")
    for name in ("config.json", "model.safetensors"):
        (folder / "blobs" / name).write_bytes((TINY / name).read_bytes())
        (snapshot / name).symlink_to(Path("..", "..", "blobs", name))
    for variables in ({"HF_HUB_CACHE": tmp_path / "hub"}, {"HF_HOME": tmp_path, "HF_HUB_CACHE": ""}):
        done = run("inspect", "org/tiny", variables=variables)
        assert done.returncode == 0, done.stderr
        assert "LlamaForCausalLM" in done.stdout
    done = run("compare", "org/tiny", "org/tiny@0123abc", variables={"HF_HUB_CACHE": tmp_path / "hub"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| org/tiny ") == 2
    done = run("inspect", "org/absent", variables={"HF_HUB_CACHE": tmp_path / "hub"})
    assert done.returncode == 2
    assert str(tmp_path / "hub") in done.stderr
    assert "hf download org/absent" in done.stderr


@pytest.mark.parametrize("change, named", [
    ({"architectures": ["MambaForCausalLM"]}, ["architectures", "MambaForCausalLM", "LlamaForCausalLM"]),
    ({"quantization_config": {"quant_method": "awq"}}, ["quant_method", "awq", "already quantized", "original"]),
    ({"rope_scaling": {"rope_type": "longrope"}}, ["rope_scaling", "longrope", "llama3"]),
], ids=["architecture", "quantized", "rope type"])
def test_model_that_is_not_supported_is_refused_in_a_sentence(run, recipe, tmp_path, change, named):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(json.loads((TINY / "config.json").read_text()) | change))
    (model / "model.safetensors").write_bytes((TINY / "model.safetensors").read_bytes())
    done = run("quantize", model, "--recipe", recipe(RTN), "--output", tmp_path / "out")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert all(part in done.stderr for part in named), done.stderr


def test_pickled_weights_are_refused_with_what_to_do(run, recipe, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((TINY / "config.json").read_bytes())
    (model / "pytorch_model.bin").write_bytes(b"")
    done = run("quantize", model, "--recipe", recipe(RTN), "--output", tmp_path / "out")
    assert done.returncode == 1
    assert "pytorch_model.bin" in done.stderr
    assert "save_pretrained" in done.stderr


def test_model_without_its_tensors_fails(run, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    config = json.loads((TINY / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    (model / "model.safetensors").write_bytes((TINY / "model.safetensors").read_bytes())
    done = run("inspect", model)
    assert done.returncode == 1
    assert "model.layers.2." in done.stderr


def test_eval_needs_exactly_one_text(run, windows):
    done = run("eval", TINY)
    assert done.returncode != 0
    assert "--tokens" in done.stderr
    assert run("eval", TINY, "--tokens", windows, "--text", windows).returncode == 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A text for the tokenizer of tests/data/tokenizer."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("the quantizer rounds a weight to its nearest step\n" * 40)
    return path


def test_tokens_of_a_corpus_are_written_once_and_evaluated_as_the_text_is(run, corpus, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    shutil.copy(ROOT / "tests" / "data" / "tokenizer" / "tokenizer.json", model)
    config = json.loads((model / "config.json").read_text())
    ids, windows, report = tmp_path / "ids.safetensors", tmp_path / "windows.safetensors", tmp_path / "report.json"
    done = run("tokenize", model, "--text", corpus, "--output", ids, "--json", report)
    assert done.returncode == 0, done.stderr
    expected = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json")).encode(corpus.read_text()).ids
    got = load_file(ids)["input_ids"]
    assert got.dtype == np.int32
    assert got.tolist() == expected
    assert json.loads(report.read_text())["num_tokens"] == len(expected)

    assert run("tokenize", model / "tokenizer.json", "--text", corpus, "--output", windows, "--seq-len", 32).returncode == 0
    got = load_file(windows)["input_ids"]
    assert got.shape == (len(expected) // 32, 32)
    assert got.ravel().tolist() == expected[: got.size]

    # The tiny model has fewer tokens than the tokenizer.
    save_file({"input_ids": np.array(expected, np.int32) % config["vocab_size"]}, ids)
    done = run("eval", model, "--tokens", ids, "--seq-len", 16, "--json", report, "--quiet")
    assert done.returncode == 0, done.stderr
    assert json.loads(report.read_text())["num_windows"] == len(expected) // 16


def test_tokenize_names_what_is_wrong(run, corpus, tmp_path):
    tokenizer = ROOT / "tests" / "data" / "tokenizer" / "tokenizer.json"
    output = tmp_path / "ids.safetensors"
    done = run("tokenize", tokenizer, "--text", corpus, "--output", output, "--seq-len", 1_000_000)
    assert done.returncode == 1
    assert "1000000" in done.stderr
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"abc\xed\xa0\x80")
    done = run("tokenize", tokenizer, "--text", bad, "--output", output)
    assert done.returncode == 1
    assert "byte 3" in done.stderr
    assert run("tokenize", tokenizer, "--text", corpus).returncode == 2
    assert not output.exists()


def test_tokens_must_be_integers(run, tmp_path):
    path = tmp_path / "ids.safetensors"
    save_file({"input_ids": np.zeros(100, np.float32)}, path)
    done = run("eval", TINY, "--tokens", path, "--seq-len", "8")
    assert done.returncode == 1
    assert "integers" in done.stderr


def test_unknown_device_fails(run, windows):
    assert run("eval", TINY, "--tokens", windows, "--device", "abacus").returncode == 2


def test_reports(quantize, evaluate, run, tmp_path):
    learn = {"step": "learn", "name": "activations", "epochs": 1, "rates": {"*.clip": 3e-2, "*.gain": 3e-3}}
    report = quantize(recipe_of(POINTS, GPTQ, learn, weights={"num_bits": 4}, inputs={"num_bits": 8}), tmp_path / "out")
    assert set(report) == {"baseq", "recipe", "calibration", "seconds", "peak_memory_bytes", "output_bytes", "blocks"}
    assert len(report["blocks"]) == 2
    for block in report["blocks"]:
        assert set(block) == {"linears", "stages", "relative_error", "seconds"}
        assert len(block["linears"]) == 7
        assert all(set(linear) == {"name", "relative_error", "damping", "seconds"} for linear in block["linears"])
        assert [stage["name"] for stage in block["stages"]] == ["activations"]
        assert block["stages"][0]["loss_after"] <= block["stages"][0]["loss_before"]
    result = evaluate(tmp_path / "out")
    assert set(result) == {"baseq", "model", "perplexity", "num_tokens", "num_windows", "seq_len", "mean_kl",
                           "top1_agreement", "model_bytes", "seconds", "peak_memory_bytes", "not_finite"}
    assert result["mean_kl"] is None
    assert run("inspect", tmp_path / "out", "--tensors", "--json", tmp_path / "inspect.json").returncode == 0
    inspected = json.loads((tmp_path / "inspect.json").read_text())
    assert set(inspected) == {"baseq", "model", "format", "config", "bytes", "bytes_by_type", "num_values",
                              "bits_per_weight", "bits_by_linear", "tensors", "unused_tensors"}
    assert len(inspected["bits_by_linear"]) == 2 * 7 and min(inspected["bits_by_linear"].values()) > 4
    assert inspected["unused_tensors"] == []
    assert {tensor["name"] for tensor in inspected["tensors"]} >= {"model.layers.0.mlp.down_proj.weight_packed",
                                                                   "model.layers.1.mlp.input_quant.clip"}


def test_a_run_says_how_many_threads_it_has(run, recipe, tmp_path):
    done = run("quantize", TINY, "--recipe", recipe(RTN), "--output", tmp_path / "out", "--threads", "2")
    assert done.stderr.splitlines()[0] == "tiny_llama_base: 2 blocks, 2 threads on cpu"
    allowed = len(os.sched_getaffinity(0))
    done = run("quantize", TINY, "--recipe", recipe(RTN), "--output", tmp_path / "out2", variables={"OMP_NUM_THREADS": ""})
    threads = int(re.search(r"(\d+) threads? on cpu", done.stderr)[1])
    assert 1 <= threads <= allowed


def test_nan_is_a_failure_that_says_where_it_began(run, windows, tmp_path):
    tensors = load_file(TINY / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    broken, report = tmp_path / "broken", tmp_path / "report.json"
    shutil.copytree(TINY, broken)
    save_file(tensors, broken / "model.safetensors")
    where = "values stop being finite in model.layers.1, first in window 1 of 4: model.layers.1.mlp.up_proj.weight"
    options = ["--tokens", windows, "--seq-len", 48, "--json", report]
    done = run("eval", broken, *options)
    assert done.returncode == 1
    assert f"{broken}: {where}" in done.stderr
    assert json.loads(report.read_text())["perplexity"] is None
    done = run("eval", TINY, "--reference", broken, *options)
    assert done.returncode == 1
    assert f"the reference: {where}" in done.stderr
    result = json.loads(report.read_text())
    assert result["perplexity"] > 1 and result["mean_kl"] is None and result["top1_agreement"] is None
    assert "0.00 %" not in done.stdout
    done = run("compare", TINY, broken, *options)
    assert done.returncode == 1
    assert where in done.stderr
    assert [model["perplexity"] is None for model in json.loads(report.read_text())["models"]] == [False, True]


def test_quiet_says_nothing_on_stderr(run, recipe, tmp_path):
    done = run("quantize", TINY, "--recipe", recipe(RTN), "--output", tmp_path / "out", "--quiet")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "recipe" in done.stdout
