"""One table of several checkpoints."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tiny_runs import ROUND, TINY, recipe_of


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
    grid = {"num_bits": 3, "symmetric": False, "strategy": "group", "group_size": 16}
    quantize(recipe_of(ROUND, weights=grid, name="a|b"), grouped)
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
