"""README.md of quantized and exported directories, as the Hugging Face Hub reads it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from tiny_runs import GPTQ, ROUND, TINY, recipe_of

GRID = {"num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": "bfloat16"}
SOURCE = """---
license: other
license_name: tiny
language:
- en
- de
base_model: other/ancestor
tags:
- tiny
- 'quoted'
model-index:
- name: tiny
  results: []
pipeline_tag: text-generation
---
# The tiny model

Its own words.
"""


def parts(readme: Path) -> tuple[dict, str]:
    _, metadata, body = re.split(r"^---\n", readme.read_text(), maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(metadata), body


@pytest.fixture
def described(tmp_path) -> Path:
    """The tiny model in a cache of the Hub, with a card."""
    model = tmp_path / "hub" / "models--org--tiny" / "snapshots" / "0123abc"
    shutil.copytree(TINY, model)
    (model / "README.md").write_text(SOURCE)
    return model


def test_a_quantized_model_has_a_card(quantize, described, tmp_path):
    out = tmp_path / "out"
    quantize(recipe_of(GPTQ, weights=GRID, name="mine"), out, model=described)
    metadata, body = parts(out / "README.md")
    assert metadata == {"license": "other", "license_name": "tiny", "language": ["en", "de"], "base_model": "org/tiny",
                        "base_model_relation": "quantized", "library_name": "transformers",
                        "pipeline_tag": "text-generation", "tags": ["baseq", "4-bit", "tiny", "quoted"]}
    assert "| weights | 4 bits, symmetric, per group of 32 |" in body and "4 windows of 48 tokens" in body
    assert body.endswith("# The tiny model\n\nIts own words.\n"), "what the source said is kept"
    recipe = json.loads(re.search(r"```json\n(.*?)```", body, re.DOTALL)[1])
    assert recipe == json.loads((out / "config.json").read_text())["quantization_config"]["recipe"]
    assert (described / "README.md").read_text() == SOURCE


def test_a_card_needs_no_source(quantize, tmp_path):
    quantize(recipe_of(ROUND, weights={"num_bits": 4}), tmp_path / "out")
    metadata, body = parts(tmp_path / "out" / "README.md")
    assert metadata == {"library_name": "transformers", "tags": ["baseq", "4-bit"]}
    assert body.lstrip().startswith("# tiny_llama_base, quantized\n")


@pytest.mark.parametrize("name, tag", [("compressed-tensors", "compressed-tensors"), ("hf", None)])
def test_an_export_keeps_what_the_card_said(quantize, export, described, tmp_path, name, tag):
    quantize(recipe_of(ROUND, weights=GRID, name="mine"), tmp_path / "out", model=described)
    export(tmp_path / "out", name, tmp_path / "exported")
    metadata, body = parts(tmp_path / "exported" / "README.md")
    assert (metadata["base_model"], metadata["base_model_relation"], metadata["license"]) == (
        "org/tiny", "quantized", "other")
    assert "baseq" in metadata["tags"] and (tag is None or tag in metadata["tags"])
    assert "quantized with mine" in body and body.endswith("Its own words.\n")
    assert ("vllm serve" in body) == (tag is not None)


@pytest.mark.parametrize("readme", [b"no metadata\n", b"---\nlicense: mit\nnever closed\n", b"---\r\nlicense: mit\r\n---\r\ntext\r\n",
                                    b"", b"---", b"\xff\xfe\n---\n"])
def test_any_readme_is_kept(quantize, described, tmp_path, readme):
    (described / "README.md").write_bytes(readme)
    quantize(recipe_of(ROUND, weights={"num_bits": 4}), tmp_path / "out", model=described)
    written = (tmp_path / "out" / "README.md").read_bytes()
    kept = readme.split(b"---\r\n")[-1] if b"\r" in readme else readme
    assert written.endswith(kept) and written.startswith(b"---\n")
    assert (b"license: mit" in written) == (b"mit" in readme)


def test_a_readme_that_is_too_long_is_copied(quantize, described, tmp_path):
    (described / "README.md").write_text("x" * (1 << 20) + "y")
    quantize(recipe_of(ROUND, weights={"num_bits": 4}), tmp_path / "out", model=described)
    assert (tmp_path / "out" / "README.md").read_bytes() == (described / "README.md").read_bytes()


def test_results_are_written_into_the_card_on_request(run, quantize, windows, tmp_path):
    out, report = tmp_path / "out", tmp_path / "eval.json"
    quantize(recipe_of(ROUND, weights={"num_bits": 4}), out)
    before = (out / "README.md").read_text()
    done = run("eval", out, "--tokens", windows, "--seq-len", 48, "--reference", TINY, "--json", report, "--quiet")
    assert done.returncode == 0 and (out / "README.md").read_text() == before, "eval writes into no checkpoint"
    done = run("card", out, "--results", report, "--on", "random tokens")
    assert done.returncode == 0, done.stderr
    after = (out / "README.md").read_text()
    perplexity = json.loads(report.read_text())["perplexity"]
    assert f"{perplexity:.3f}" in after and "`baseq eval` on random tokens" in after
    assert run("card", out, "--results", report).returncode == 0
    again = (out / "README.md").read_text()
    assert again.count("## Measured") == 1 and "random tokens" not in again
    (out / "README.md").write_text("mine")
    done = run("card", out, "--results", report)
    assert done.returncode == 1 and "between which results belong" in done.stderr
    assert (out / "README.md").read_text() == "mine"
