"""Nothing in a checkpoint makes the program write outside the output directory, and nothing in it is executed."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

from tiny_runs import ROOT, RTN, TINY

DATA = ROOT / "tests" / "data"


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(RTN))
    return path


def tree(directory: Path) -> dict[str, tuple[bool, bytes]]:
    """Every file below: whether it is a link, and what it holds."""
    return {str(path.relative_to(directory)): (path.is_symlink(), path.read_bytes() if path.is_file() else b"")
            for path in directory.rglob("*")}


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "sub/../../x.safetensors", "..", "."])
def test_index_cannot_name_files_elsewhere(run, recipe, tmp_path, name):
    model = tmp_path / "model"
    shutil.copytree(DATA / "tiny_llama_sharded", model)
    shutil.copy(model / "model-00001-of-00004.safetensors", tmp_path / "outside.safetensors")
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = name
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    before = tree(tmp_path)
    done = run("quantize", model, "--recipe", recipe, "--output", tmp_path / "out")
    assert done.returncode == 1
    assert "expected the plain name of a file in the same directory" in done.stderr
    assert tree(tmp_path) == before


def test_links_and_odd_side_files_stay_inside(run, recipe, tmp_path):
    model, outside = tmp_path / "model", tmp_path / "outside"
    shutil.copytree(TINY, model)
    outside.mkdir()
    (outside / "victim.txt").write_text("mine")
    # Links that lead away are neither read nor written through; the names are those the writer works with.
    for name in ("notes.txt", "config.json.baseq.tmp", "model-1.safetensors.baseq.tmp", ".scratch", "modeling_baseq.py",
                 "model.safetensors.index.json.baseq.tmp"):
        (model / name).symlink_to(outside / "victim.txt")
    (model / "sub").symlink_to(outside, target_is_directory=True)
    os.mkfifo(model / "pipe.txt")
    before = tree(outside)
    done = run("quantize", model, "--recipe", recipe, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert tree(outside) == before
    written = tree(tmp_path / "out")
    assert not any(link for link, _ in written.values())
    assert b"mine" not in [content for _, content in written.values()]
    assert '"notes.txt" (links that leave the checkpoint)' in done.stderr
    assert b"class" in written["modeling_baseq.py"][1]
    assert not {"sub", "pipe.txt", "notes.txt"} & set(written)
    assert json.loads(written["config.json"][1])["quantization_config"]["quant_method"] == "baseq"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "outside", "recipe.json"]


def test_links_in_the_way_of_the_output_are_not_followed(run, recipe, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim.txt").write_text("mine")
    (tmp_path / "out.partial").symlink_to(outside, target_is_directory=True)
    done = run("quantize", TINY, "--recipe", recipe, "--output", tmp_path / "out")
    assert done.returncode == 1
    assert "out.partial" in done.stderr
    (tmp_path / "out.partial").unlink()
    (tmp_path / "report.json.tmp").symlink_to(outside / "victim.txt")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "run.json.tmp").symlink_to(outside / "victim.txt")
    done = run("quantize", TINY, "--recipe", recipe, "--output", tmp_path / "out", "--work", tmp_path / "work",
               "--json", tmp_path / "report.json")
    assert done.returncode == 0, done.stderr
    assert tree(outside) == {"victim.txt": (False, b"mine")}


def test_names_of_tensors_are_not_paths(run, recipe, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    content = (model / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8:8 + length])
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    header["../../evil"] = {"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}
    text = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length:] + bytes(4))
    for options in ([], ["--work", tmp_path / "work"]):
        done = run("quantize", model, "--recipe", recipe, "--output", tmp_path / "out", "--force", *options)
        assert done.returncode == 1
        assert '"../../evil" is not used: LlamaForCausalLM has no such tensors' in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "recipe.json"]


def test_nothing_in_a_checkpoint_is_executed(run, recipe, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    for name in ("pytorch_model.bin", "training_args.bin", "consolidated.00.pth"):
        (model / name).write_bytes(pickle.dumps(Payload()))
    code = f"open({str(tmp_path / 'executed')!r}, 'w')\n"
    for name in ("modeling_evil.py", "tokenization_evil.py", "setup.py", "conftest.py"):
        (model / name).write_text(code)
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_evil.Config", "AutoTokenizer": ["tokenization_evil.Tokenizer", None]}
    config["_name_or_path"] = f"$(touch {tmp_path / 'executed'})"
    (model / "config.json").write_text(json.dumps(config))
    for arguments in (["quantize", model, "--recipe", recipe, "--output", tmp_path / "out"], ["inspect", model],
                      ["export", tmp_path / "out", "--format", "hf", "--output", tmp_path / "hf"]):
        done = run(*arguments)
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "executed").exists()
    assert {path.name for path in (tmp_path / "out").iterdir() if path.suffix in {".py", ".bin", ".pth"}} == \
        {"modeling_baseq.py"}
    assert not list((tmp_path / "hf").glob("*.py"))
    (model / "model.safetensors").unlink()
    done = run("quantize", model, "--recipe", recipe, "--output", tmp_path / "out2")
    assert done.returncode == 1 and "pickled" in done.stderr
    assert not (tmp_path / "executed").exists()
