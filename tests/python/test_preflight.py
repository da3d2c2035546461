"""What quantize finds out before it starts: everything that would stop it, at once, and what it will take."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import SEQ_LEN, SMALL
from test_faults import mounted
from tiny_runs import GPTQ, ROOT, ROUND, TINY, config_file, hadamard, recipe_of

GPTQ_FILE = config_file("gptq-w4a16")
SETTINGS = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]


def copy_of_tiny(directory: Path, tensors=None, **config) -> Path:
    shutil.copytree(TINY, directory)
    (directory / "config.json").write_text(json.dumps(json.loads((TINY / "config.json").read_text()) | config))
    if tensors is not None:
        save_file(tensors, directory / "model.safetensors")
    return directory


def test_dry_run_says_what_a_run_takes_and_writes_nothing(run, windows, tmp_path):
    report = tmp_path / "report.json"
    done = run("quantize", TINY, "--recipe", GPTQ_FILE, "--calibration", windows, "--output", tmp_path / "sub" / "out",
               "--work", tmp_path / "work", "--activations", "disk", "--dry-run", "--json", report, *SETTINGS)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["report.json"]
    plan = json.loads(report.read_text())
    assert set(plan) == {"baseq", "memory_bytes", "memory", "disk", "seconds", "warnings", "num_blocks", "num_threads",
                         "peak_memory_bytes", "device_memory", "calibration"}
    assert plan["device_memory"] == {}  # on the CPU
    assert plan["num_threads"] == 1
    assert plan["num_blocks"] == 2
    assert plan["seconds"] > 0
    assert plan["memory_bytes"] == sum(plan["memory"].values())
    assert set(plan["disk"]) == {str(tmp_path / "sub"), str(tmp_path / "work")}
    for part in ("memory", "disk", "time"):
        assert f"  {part}  " in done.stdout


def test_disk_estimate_is_the_size_of_what_is_written(run, quantize, windows, tmp_path):
    for recipe in ("gptq-w4a16", "rotated", "rtn-w8a8", "baseq-plus-w4a4kv4", "low-rank"):
        if recipe == "low-rank":
            path = tmp_path / "low-rank.json"
            path.write_text(json.dumps(recipe_of(ROUND | {"low_rank": {"rank": 24}}, weights={"num_bits": 4}, name=recipe)))
        else:
            path = config_file(recipe)
        done = run("quantize", TINY, "--recipe", path, "--calibration", windows, "--output", tmp_path / recipe,
                   "--shard-size", 1, "--dry-run", "--json", tmp_path / "plan.json", *SETTINGS)
        assert done.returncode == 0, done.stderr
        (estimated,) = json.loads((tmp_path / "plan.json").read_text())["disk"].values()
        written = quantize(path, tmp_path / recipe)["output_bytes"]
        everything = sum(path.stat().st_size for path in (tmp_path / recipe).iterdir())
        assert written < everything <= estimated < 1.2 * everything + (64 << 10), recipe


def test_everything_that_is_wrong_is_said_at_once(run, tmp_path):
    tensors = load_file(TINY / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    model = copy_of_tiny(tmp_path / "model", tensors)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(recipe_of(ROUND, weights={"num_bits": 4, "strategy": "group", "group_size": 28})))
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("mine")
    done = run("quantize", model, "--recipe", recipe, "--calibration", tmp_path / "text.txt", "--output", tmp_path / "out")
    assert done.returncode == 1
    for part in ("problems:", "tokenizer.json", "out: exists; pass --force", "model.layers.1.mlp.up_proj.weight",
                 "grids.weights.group_size: 28 does not divide"):
        assert part in done.stderr
    assert "frame #" not in done.stderr
    assert os.listdir(tmp_path / "out") == ["letter.txt"]


def test_shapes_and_token_ids_are_looked_at_before_the_first_block(run, tmp_path):
    tensors = load_file(TINY / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((3, 5), np.float32)
    tensors["model.layers.1.input_layernorm.weight"] = np.ones(7, np.float32)
    model = copy_of_tiny(tmp_path / "model", tensors)
    ids = tmp_path / "ids.safetensors"
    save_file({"input_ids": np.full((4, SEQ_LEN), 1_000_000, np.int32)}, ids)
    done = run("quantize", model, "--recipe", GPTQ_FILE, "--calibration", ids, "--output", tmp_path / "out", *SETTINGS)
    assert done.returncode == 1
    for part in ("3 problems", "up_proj.weight: shape is [3, 5]", "input_layernorm.weight: shape is [7]",
                 "token ids run from 1000000 to 1000000"):
        assert part in done.stderr
    assert not (tmp_path / "out.partial").exists()


def test_sizes_without_a_hadamard_matrix(run, windows, tmp_path):
    config = json.loads((TINY / "config.json").read_text())
    odd, ragged = 95, 90
    for size in (odd, ragged):
        tensors = load_file(TINY / "model.safetensors")
        for name in tensors:
            if "gate_proj" in name or "up_proj" in name:
                tensors[name] = tensors[name][:size].copy()
            if "down_proj" in name:
                tensors[name] = tensors[name][:, :size].copy()
        copy_of_tiny(tmp_path / str(size), tensors, intermediate_size=size)
    assert config["intermediate_size"] == 96
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(recipe_of(hadamard("down"), ROUND, weights={"num_bits": 4})))
    refused = run("quantize", tmp_path / str(odd), "--recipe", recipe, "--output", tmp_path / "out")
    assert refused.returncode == 1
    assert "steps[0].at: \"down\": size 95 has no Hadamard matrix nor an even divisor" in refused.stderr
    done = run("quantize", tmp_path / str(ragged), "--recipe", recipe, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "steps[0].at: \"down\": size 90 has no Hadamard matrix; it is rotated in blocks of 2" in done.stderr


def test_memory_budget_chooses_and_refuses(run, windows, tmp_path):
    def attempt(budget, **options):
        return run("quantize", TINY, "--recipe", GPTQ_FILE, "--calibration", windows, "--memory", budget,
                   "--output", tmp_path / budget, *SETTINGS)

    roomy = attempt("8G")
    assert roomy.returncode == 0
    assert "activations in memory, 2048 tokens a batch" in roomy.stderr
    refused = attempt("1M")
    assert refused.returncode == 1
    assert "too little; at least" in refused.stderr
    assert not (tmp_path / "1M").exists()
    assert run("quantize", TINY, "--recipe", GPTQ_FILE, "--output", tmp_path / "x", "--memory", "much").returncode == 2


def test_a_budget_between_puts_the_streams_on_disk(run, tmp_path):
    vocab_size = json.loads((TINY / "config.json").read_text())["vocab_size"]
    ids = tmp_path / "ids.safetensors"
    save_file({"input_ids": np.random.default_rng(0).integers(0, vocab_size, (256, 512), dtype=np.int32)}, ids)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(recipe_of(GPTQ, weights={"num_bits": 4}, calibration={"num_samples": 256, "seq_len": 512})))

    def quantize(output, *options):
        done = run("quantize", TINY, "--recipe", recipe, "--calibration", ids, "--output", output,
                   "--json", tmp_path / "report.json", *options)
        assert done.returncode == 0, done.stderr
        return done.stderr

    # Three streams of 256 x 512 x 64 float32 values are 96 MiB.
    said = quantize(tmp_path / "disk", "--memory", "300M")
    assert "activations on disk, 2048 tokens a batch" in said
    quantize(tmp_path / "ram")
    assert (tmp_path / "disk" / "model.safetensors").read_bytes() == (tmp_path / "ram" / "model.safetensors").read_bytes()
    said = quantize(tmp_path / "small", "--memory", "259M")
    assert "activations on disk, 512 tokens a batch" in said


def test_eval_within_a_budget_gives_the_same_number(run, windows, tmp_path):
    def evaluate(*options):
        done = run("eval", TINY, "--tokens", windows, "--seq-len", SEQ_LEN, "--json", tmp_path / "report.json", *options)
        return done, json.loads((tmp_path / "report.json").read_text())["perplexity"]

    free, expected = evaluate()
    assert free.returncode == 0
    fits, got = evaluate("--memory", "8G")
    assert "hidden states in memory" in fits.stderr
    assert got == expected
    refused, _ = evaluate("--memory", "1M")
    assert refused.returncode == 1
    assert "too little" in refused.stderr


def test_what_a_model_would_lose_is_refused_or_said(run, windows, tmp_path):
    tensors = load_file(TINY / "model.safetensors")
    harmless = "model.layers.0.self_attn.rotary_emb.inv_freq"
    model = copy_of_tiny(tmp_path / "buffers", tensors | {harmless: np.ones(4, np.float32)})
    done = run("quantize", model, "--recipe", GPTQ_FILE, "--calibration", windows, "--output", tmp_path / "out", *SETTINGS)
    assert done.returncode == 0 and f'"{harmless}" is not used' in done.stderr
    done = run("export", model, "--format", "hf", "--output", tmp_path / "hf")
    assert done.returncode == 0 and f'"{harmless}" is not used' in done.stderr

    lost = {"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32), "model.layers.2.foo": np.ones(1, np.float32),
            "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
    for name, tensor in lost.items():
        model = copy_of_tiny(tmp_path / name, tensors | {name: tensor}, tie_word_embeddings=True)
        said = f'"{name}" is not used: '
        for command in (["quantize", model, "--recipe", GPTQ_FILE, "--calibration", windows, *SETTINGS],
                        ["export", model, "--format", "hf"]):
            done = run(*command, "--output", tmp_path / "lost")
            assert done.returncode == 1 and said in done.stderr, command
            assert not (tmp_path / "lost").exists()
        report = tmp_path / "report.json"
        for command in (["eval", model, "--tokens", windows, "--seq-len", SEQ_LEN, "--quiet"], ["inspect", model],
                        ["compare", model, "--quiet"]):
            done = run(*command, "--json", report)
            assert done.returncode == 0 and said in done.stderr, command
        assert run("inspect", model, "--json", report).returncode == 0
        assert json.loads(report.read_text())["unused_tensors"] == [name]


def with_vocabulary(directory: Path, size: int) -> Path:
    tensors = load_file(TINY / "model.safetensors")
    hidden = tensors["model.embed_tokens.weight"].shape[1]
    tensors["model.embed_tokens.weight"] = np.random.default_rng(0).normal(size=(size, hidden)).astype(np.float32)
    model = copy_of_tiny(directory, tensors, vocab_size=size)
    shutil.copy(ROOT / "tests" / "data" / "tokenizer" / "tokenizer.json", model)
    return model


@pytest.mark.parametrize("options", [["hf"], ["gguf", "--gguf-type", "F16"]], ids=["hf", "gguf"])
def test_an_export_looks_for_room_before_it_writes(run, tmp_path, options):
    model = with_vocabulary(tmp_path / "model", 1024)
    with mounted(tmp_path / "small", "size=128k") as disk:
        done = run("export", model, "--format", *options, "--output", disk / "out")
        assert done.returncode == 1
        assert "will be written but 128 KiB are free" in done.stderr
        assert os.listdir(disk) == []


def test_a_disk_with_room_for_the_output_is_enough(run, windows, tmp_path):
    model = with_vocabulary(tmp_path / "model", 16384)
    arguments = ["quantize", model, "--recipe", GPTQ_FILE, "--calibration", windows, *SETTINGS]
    assert run(*arguments, "--output", tmp_path / "out").returncode == 0
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    with mounted(tmp_path / "disk", f"size={int(1.2 * written) // 4096 * 4096}") as disk:
        done = run(*arguments, "--output", disk / "out")
        assert done.returncode == 0, done.stderr


def test_a_link_to_nothing_that_the_model_does_not_need_ends_no_run(run, windows, tmp_path):
    model = copy_of_tiny(tmp_path / "model")
    (model / "consolidated.safetensors").symlink_to("nowhere")
    arguments = ["quantize", model, "--recipe", GPTQ_FILE, "--calibration", windows, "--output", tmp_path / "out", *SETTINGS]
    done = run(*arguments, "--work", tmp_path / "work")
    assert done.returncode == 0, done.stderr
    (model / "tokenizer.json").symlink_to("nowhere")
    done = run(*arguments, "--force")
    assert done.returncode == 1
    assert "tokenizer.json: is a link to nothing; incomplete download?" in done.stderr
