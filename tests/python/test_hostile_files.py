"""A file that asks for more than it is worth gets a sentence: no crash, no endless work, no memory by the gigabyte."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_runs import ROUND, RTN, TINY, hadamard, recipe_of

TOKENIZER = TINY.parent / "tokenizer" / "tokenizer.json"
MEGABYTES = 256
SECONDS = 20  # each takes less than one alone on a machine; others may keep it busy
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 17210200\n"


# A process counts the memory of the one it was forked from; between the tests and the program stands a small one.
MEASURE = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.fixture(scope="session")
def peak(binary):
    """peak(*arguments) -> exit status, stderr and the most memory in bytes; fails where it does not end."""

    def call(*arguments) -> tuple[int, str, int]:
        command = [sys.executable, "-c", MEASURE, "timeout", "-s", "KILL", str(SECONDS), binary, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        status, kibibytes = map(int, done.stdout.split())
        return status, done.stderr, kibibytes * 1024

    return call


@pytest.fixture(scope="session")
def refused(peak):
    """refused(sentence, *arguments): the program ends with an error that says `sentence`, within time and memory."""
    _, _, alone = peak("inspect", TINY)

    def call(sentence: str, *arguments) -> None:
        status, errors, most = peak(*arguments)
        assert status == 1, f"exit status {status}: {errors[:2000]}"
        assert errors.count("error:") == 1 and sentence in errors, errors[:2000]
        assert len(errors) < 17_000
        assert most - alone < MEGABYTES << 20, f"{most >> 20} MiB, {alone >> 20} of them for any file"

    return call


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(what: str, by: str) -> dict:
    return {"type": "Replace", "pattern": {"String": what}, "content": by}


def with_member(text: str) -> str:
    """The tokenizer of the tests with one member more."""
    return TOKENIZER.read_text().rstrip().removesuffix("}") + f', "x": {text}}}'


def changed(**members) -> str:
    return json.dumps(json.loads(TOKENIZER.read_text()) | members)


def normalizers(steps: list) -> str:
    return changed(normalizer={"type": "Sequence", "normalizers": steps})


TOKENIZERS = {
    "nested": (lambda: with_member("[" * 10**5 + "]" * 10**5), "nests deeper than 64 levels"),
    "nested_sequences": (lambda: with_member('{"type":"Sequence","normalizers":[' * 10**5 + "]}" * 10**5),
                         "nests deeper than 64 levels"),
    "many_empty_objects": (lambda: with_member("[" + "{}," * 10**7 + "{}]"), "more than 224 MiB of memory"),
    "long_text": (lambda: with_member('"' + "x" * (40 << 20) + '"'), "not supported: x = "),
    "long_file": (lambda: with_member(" " * (65 << 20) + "1"), "expected at most 67108864"),
    "many_steps": (lambda: normalizers([{"type": "Lowercase"}] * 10**5), "at most 64 are supported"),
    "many_expressions": (lambda: changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [split("[^a]" * 60)] * 60}),
                         "at most 4096 are supported"),
    "doubling": (lambda: normalizers([replace("e", "ee")] * 50), "more than 32 times"),
    "long_replacement": (lambda: normalizers([replace("e", "x" * 10**6)]), "more than 32 times"),
    "exponential": (lambda: changed(pre_tokenizer=split("(?:[a-z ]|[a-z ][a-z ])+[^a-z ]|.")), "takes too long"),
    "quadratic": (lambda: changed(pre_tokenizer=split("[a-z](?=[^0]++[01])|.")), "takes too long"),
    "git_lfs": (lambda: LFS_POINTER, "git lfs pull"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(refused, tmp_path, name):
    make, sentence = TOKENIZERS[name]
    (tmp_path / "tokenizer.json").write_text(make())
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog and " * 2000)
    refused(sentence, "tokenize", tmp_path / "tokenizer.json", "--text", tmp_path / "text.txt", "--output",
            tmp_path / "ids.safetensors")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(num_tensors: int, num_pairs: int, rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_pairs) + rest


def array(kind: int, count: int) -> bytes:
    return text("k") + struct.pack("<IIQ", 9, kind, count)


GGUFS = {
    "bytes": (lambda: gguf(0, 1, array(0, 1 << 26)), 1 << 26),
    "empty_texts": (lambda: gguf(0, 1, array(8, 1 << 23)), 1 << 26),
    "empty_arrays": (lambda: gguf(0, 1, array(9, 5 << 20)), 1 << 26),
    "tensors": (lambda: gguf(10**6, 0, b"".join(text(f"{i}") + struct.pack("<IIQ", 0, 0, 0) for i in range(10**6))), 64),
}


@pytest.mark.parametrize("name", GGUFS)
def test_gguf_headers(refused, tmp_path, name):
    make, zeros = GGUFS[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(make())
    os.truncate(path, path.stat().st_size + zeros)
    refused("takes more than 224 MiB of memory", "inspect", path)


@pytest.fixture
def model(tmp_path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def change_config(model: Path, **members) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | members))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_json_of_checkpoints(refused, model, name):
    """Three bytes of text become a value of a hundred."""
    values = b'{"a":[' + b"{}," * 10**7 + b"{}]}"
    if name == "model.safetensors":
        values = struct.pack("<Q", len(values)) + values
    if name.endswith("index.json"):
        (model / "model.safetensors").unlink()
    (model / name).write_bytes(values)
    refused("takes more than 224 MiB of memory", "inspect", model)


@pytest.mark.parametrize("sizes", [
    {"num_attention_heads": 1073741789, "num_key_value_heads": 1073741789, "head_dim": 1073741818},
    {"num_attention_heads": 2**15, "num_key_value_heads": 2**15, "head_dim": 2**15},
    {"hidden_size": 2**30, "intermediate_size": 2**30 - 35}])
def test_sizes_that_no_model_has(refused, model, sizes):
    file = model.parent / "recipe.json"
    file.write_text(json.dumps(RTN | {"steps": [hadamard("residual", "o", "down"), ROUND]}))
    change_config(model, **sizes)
    refused("1048576", "quantize", model, "--recipe", file, "--output", model.parent / "out", "--dry-run")


@pytest.fixture(scope="session")
def packed(run, tmp_path_factory) -> Path:
    """The tiny model as compressed-tensors packs it, written by this program."""
    folder = tmp_path_factory.mktemp("packed")
    (folder / "recipe.json").write_text(json.dumps(recipe_of(ROUND, weights={"num_bits": 4, "scale_dtype": "bfloat16"})))
    for arguments in (["quantize", TINY, "--recipe", folder / "recipe.json", "--output", folder / "native"],
                      ["export", folder / "native", "--format", "compressed-tensors", "--output", folder / "packed"]):
        done = run(*arguments, "--quiet")
        assert done.returncode == 0, done.stderr
    return folder / "packed"


@pytest.mark.parametrize("columns", [2**62 + 8, 2**61, 2**63 - 1, -8])
def test_packed_shapes_that_wrap(refused, packed, windows, tmp_path, columns):
    model = Path(shutil.copytree(packed, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if name.endswith("weight_shape"))
    tensors[name] = torch.tensor([int(tensors[name][0]), columns])
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    refused(f" {columns} columns", "eval", model, "--tokens", windows, "--seq-len", 48)


@pytest.mark.parametrize("targets", [["re:(.*)*(.*)*(.*)*(.*)*[!?]"], ["re:((((.+)+)+)+)+[!?]"] * 200,
                                     ["re:.*"] * 10**5])
def test_expressions_of_compressed_tensors(refused, packed, tmp_path, targets):
    model = Path(shutil.copytree(packed, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["targets"] = targets
    (model / "config.json").write_text(json.dumps(config))
    refused("regular expression", "inspect", model)


def test_a_git_lfs_pointer_is_named(refused, model):
    (model / "model.safetensors").write_text(LFS_POINTER)
    refused("git lfs pull", "inspect", model)
    (model.parent / "x.gguf").write_text(LFS_POINTER)
    refused("git lfs pull", "inspect", model.parent / "x.gguf")


def test_a_link_to_nowhere_does_not_stop_a_run_with_work(run, model, tmp_path):
    (model / "consolidated.safetensors").symlink_to("gone")
    (tmp_path / "recipe.json").write_text(json.dumps(RTN))
    done = run("quantize", model, "--recipe", tmp_path / "recipe.json", "--output", tmp_path / "out", "--work",
               tmp_path / "work")
    assert done.returncode == 0, done.stderr


def test_names_cannot_steer_the_terminal(run, model, tmp_path):
    escape = "\x1b]0;title\x07\x1b[31m\x9b2J"
    (tmp_path / "recipe.json").write_text(json.dumps(RTN | {"name": f"r{escape}tn"}))
    done = run("quantize", model, "--recipe", tmp_path / "recipe.json", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    outputs = [done.stdout, run("inspect", tmp_path / "out").stdout]
    assert all(r"r\x1b]0;title\x07\x1b[31m\x9b2Jtn" in output for output in outputs)
    change_config(model, architectures=[f"Llama{escape}"])
    outputs.append(run("inspect", model).stderr)
    assert r"Llama\x1b]0;title" in outputs[-1]
    tensors = load_file(TINY / "model.safetensors") | {f"evil{escape}": torch.zeros(1)}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    change_config(model, architectures=["LlamaForCausalLM"])
    done = run("inspect", model, "--tensors")
    outputs += [done.stdout, done.stderr]
    for output in outputs:
        assert not {c for c in output if (ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0}, output


def test_dtypes_have_the_names_of_safetensors(run):
    shown = run("inspect", TINY, "--tensors").stdout
    assert "F32" in shown and "Float" not in shown
