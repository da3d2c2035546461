"""`baseq export --format peft`: a base checkpoint and a LoRA adapter that peft puts together again; and what the other
formats make of low-rank corrections."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from native_checkpoint import read
from safetensors.torch import load_file
from test_export import BIASED, DATA, LINEARS, TINY, loaded_logits, relative_error
from test_gguf import VOCAB

from tiny_runs import ROUND, hadamard, recipe_of

RANK = 5
GRID = {"num_bits": 3, "strategy": "group", "group_size": 16, "scale_dtype": "bfloat16"}
CORRECTED = ROUND | {"low_rank": {"method": "svd", "rank": RANK}}
RECIPE = recipe_of(CORRECTED, weights=GRID, dtype="float32")
FACTORS = ("lora_A", "lora_B")


@pytest.fixture(scope="session")
def peft():
    return pytest.importorskip("peft", reason="peft is not installed: its loader is the proof of the peft format; pip "
                               "install -r tests/requirements.txt")


def adapted_logits(peft, folder: Path, ids: torch.Tensor, merge: bool = False) -> torch.Tensor:
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(base, folder / "adapter")
    scalings = [module.scaling["default"] for module in model.modules() if hasattr(module, "lora_A")]
    assert scalings and set(scalings) == {1}
    with torch.no_grad():
        return (model.merge_and_unload() if merge else model).eval()(ids).logits


@pytest.mark.parametrize("model", [TINY, BIASED], ids=["tied", "untied-bias"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("transforms", [[], [hadamard("residual", "value")], [hadamard("qkv", "gate_up", "o", "down")]],
                         ids=["plain", "rotated", "online"])
def test_base_and_adapter_have_the_logits_of_the_native_checkpoint(peft, round_off, export, logits_of, tmp_path, model,
                                                                   transforms, dtype):
    corrected = ROUND | {"low_rank": CORRECTED["low_rank"] | {"dtype": dtype}}
    round_off(recipe_of(*transforms, corrected, weights=GRID, dtype="float32"), tmp_path / "native", model=model)
    export(tmp_path / "native", "peft", tmp_path / "out", "--dtype", "float32")
    ids, expected = logits_of(tmp_path / "native")
    assert relative_error(adapted_logits(peft, tmp_path / "out", ids), expected) < 1e-5
    assert relative_error(adapted_logits(peft, tmp_path / "out", ids, merge=True), expected) < 1e-5
    assert relative_error(loaded_logits(tmp_path / "out", ids), expected) > 1e-3


def test_the_adapter_holds_the_factors_as_they_are(round_off, export, tmp_path):
    round_off(RECIPE, tmp_path / "native")
    report = export(tmp_path / "native", "peft", tmp_path / "out")
    native = read(tmp_path / "native")[1]
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    names = [f"model.layers.{layer}.{linear}.{factor}" for layer in range(2) for linear in LINEARS
             for factor in FACTORS]
    assert sorted(adapter) == sorted(f"base_model.model.{name}.weight" for name in names)
    for name in names:
        assert torch.equal(adapter[f"base_model.model.{name}.weight"], native[name]), name
    base = read(tmp_path / "out")[1]
    assert not any("lora" in name for name in base)
    assert {tensor["name"] for tensor in report["tensors"]} == base.keys() | adapter.keys()
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == RANK
    assert sorted(config["target_modules"]) == sorted(linear.split(".")[1] for linear in LINEARS)


def test_a_rank_above_a_weights_side_is_filled_with_zeros(peft, round_off, export, logits_of, tmp_path):
    round_off(RECIPE | {"steps": [ROUND | {"low_rank": {"method": "svd", "rank": 40}}]}, tmp_path / "native")
    export(tmp_path / "native", "peft", tmp_path / "out", "--dtype", "float32")
    ids, expected = logits_of(tmp_path / "native")
    assert relative_error(adapted_logits(peft, tmp_path / "out", ids), expected) < 1e-5


def test_hf_folds_the_corrections_into_the_weights(round_off, export, logits_of, tmp_path):
    round_off(RECIPE, tmp_path / "native")
    export(tmp_path / "native", "hf", tmp_path / "exact", "--dtype", "float32")
    ids, expected = logits_of(tmp_path / "native")
    assert relative_error(loaded_logits(tmp_path / "exact", ids), expected) < 1e-5
    export(tmp_path / "native", "hf", tmp_path / "out")
    exact, rounded = read(tmp_path / "exact")[1], read(tmp_path / "out")[1]
    assert not any("lora" in name for name in rounded)
    for name in (f"model.layers.{layer}.{linear}.weight" for layer in range(2) for linear in LINEARS):
        assert torch.equal(rounded[name], exact[name].bfloat16()), name
    round_off(RECIPE | {"steps": [ROUND]}, tmp_path / "plain")
    assert relative_error(logits_of(tmp_path / "plain")[1], expected) > 1e-3


def test_gguf_f16_folds_them_too(round_off, export, tmp_path):
    gguf = pytest.importorskip("gguf")
    # As many tokens as the tokenizer of the tests has, which a GGUF file holds.
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        vocab_size=VOCAB, architectures=["LlamaForCausalLM"])).save_pretrained(tmp_path / "model")
    shutil.copy(DATA / "tokenizer" / "tokenizer.json", tmp_path / "model")
    round_off(RECIPE, tmp_path / "native", model=tmp_path / "model")
    export(tmp_path / "native", "hf", tmp_path / "hf", "--dtype", "float16")
    export(tmp_path / "native", "gguf", tmp_path / "out.gguf", "--gguf-type", "F16")
    written = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    expected = read(tmp_path / "hf")[1]["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(torch.from_numpy(written["blk.1.ffn_up.weight"].copy()), expected)


@pytest.mark.parametrize("arguments", [("compressed-tensors",), ("gptq",), ("awq",), ("gguf", "--gguf-type", "Q4_1")],
                         ids=lambda arguments: arguments[0])
def test_formats_of_codes_alone_refuse_them(run, round_off, tmp_path, arguments):
    weights = {"num_bits": 4, "strategy": "group", "group_size": 16, "scale_dtype": "float16"}
    round_off(recipe_of(CORRECTED, weights=weights), tmp_path / "native")
    done = run("export", tmp_path / "native", "--format", *arguments, "--output", tmp_path / "out")
    assert done.returncode == 1 and "low rank" in done.stderr
    assert not (tmp_path / "out").exists()


def test_fused_projections_are_refused(run, round_off, export, logits_of, tmp_path):
    round_off(RECIPE, tmp_path / "native", model=DATA / "tiny_phi3")
    done = run("export", tmp_path / "native", "--format", "peft", "--output", tmp_path / "out")
    assert done.returncode == 1 and "qkv_proj" in done.stderr and "choose format hf" in done.stderr
    assert not (tmp_path / "out").exists()
    export(tmp_path / "native", "hf", tmp_path / "hf", "--dtype", "float32")
    ids, expected = logits_of(tmp_path / "native")
    assert relative_error(loaded_logits(tmp_path / "hf", ids), expected) < 1e-5


def test_peft_without_corrections_is_refused(run, round_off, tmp_path):
    round_off(RECIPE | {"steps": [ROUND]}, tmp_path / "native")
    for model in (tmp_path / "native", TINY):
        done = run("export", model, "--format", "peft", "--output", tmp_path / "out")
        assert done.returncode == 1 and "no low-rank corrections" in done.stderr and "hf" in done.stderr
