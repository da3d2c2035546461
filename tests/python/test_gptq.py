"""`baseq export --format gptq` and `awq`: dequantized by the published layouts and run by GPTQModel where it is installed.

GPTQModel needs another transformers than the other tests: BASEQ_GPTQMODEL_PYTHON names a Python that has it."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import gptq_checkpoint
import native_checkpoint
import numpy as np
import pytest
import torch
import transformers
from native_checkpoint import read
from safetensors.torch import load_file, save_file

from tiny_runs import ROUND, config_file, hadamard, recipe_of

ROOT = Path(__file__).resolve().parents[2]
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")
CASES = [("gptq", bits, symmetric, strategy) for bits in (2, 3, 4, 8) for symmetric in (True, False)
         for strategy in ("group", "channel")]
CASES += [("gptq", 4, True, "tensor"), ("gptq", 4, False, "tensor")]
CASES += [("awq", 4, symmetric, strategy) for symmetric in (True, False) for strategy in ("group", "channel", "tensor")]


def case_name(case: tuple) -> str:
    name, bits, symmetric, strategy = case
    return f"{name}-w{bits}-{strategy}{'' if symmetric else '-asymmetric'}"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_hidden_layers=2, vocab_size=640, max_position_embeddings=256, attention_bias=True,
        tie_word_embeddings=False, architectures=["LlamaForCausalLM"])
    network = transformers.LlamaForCausalLM(config).half()
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(folder)
    shutil.copy(ROOT / "tests" / "data" / "tokenizer" / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>"}')
    return folder


@pytest.fixture(scope="module")
def exported(round_off, export, model, tmp_path_factory):
    """exported(case) -> native and exported folder."""
    made = {}

    def call(case: tuple) -> tuple[Path, Path]:
        if case not in made:
            name, bits, symmetric, strategy = case
            folder = tmp_path_factory.mktemp("gptq")
            weights = {"num_bits": bits, "symmetric": symmetric, "strategy": strategy, "scale_dtype": "float16"}
            if strategy == "group":
                weights["group_size"] = 32
            round_off(recipe_of(hadamard("residual"), ROUND, weights=weights, dtype="float16"), folder / "native",
                      model=model)
            export(folder / "native", name, folder / name)
            made[case] = folder / "native", folder / name
        return made[case]

    return call


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_the_published_layout_gives_the_weights(exported, case):
    native, out = exported(case)
    native_config, source = read(native)
    config, tensors = read(out)
    quantization = config["quantization_config"]
    assert (quantization["quant_method"], quantization["bits"]) == case[:2]
    assert quantization["group_size"] == (32 if case[3] == "group" else -1)
    for name in (f"model.layers.{layer}.{linear}" for layer in range(2) for linear in LINEARS):
        expected = native_checkpoint.dequantize(source, name, native_config["quantization_config"]["weights"])
        got = gptq_checkpoint.dequantize(tensors, name, quantization)
        assert np.array_equal(got, expected), name
        assert tensors[f"{name}.scales"].dtype == torch.float16
        if name.endswith("q_proj"):
            assert torch.equal(tensors[f"{name}.bias"], source[f"{name}.bias"].half())
    dense = {name for name in tensors if not name.endswith(("qweight", "qzeros", "scales", "g_idx", "bias"))}
    assert {tensors[name].dtype for name in dense} == {torch.float16}
    assert config["dtype"] == "float16"


def test_the_two_versions_of_gptq_differ_in_the_zeros(exported):
    version_1, version_2 = (read(exported(("gptq", 4, symmetric, "group"))[1]) for symmetric in (True, False))
    assert version_1[0]["quantization_config"]["checkpoint_format"] == "gptq"
    assert version_2[0]["quantization_config"]["checkpoint_format"] == "gptq_v2"
    zeros = version_1[1]["model.layers.0.mlp.up_proj.qzeros"]
    assert (zeros == 0x77777777).all(), "eight minus one in every nibble"
    assert version_1[0]["quantization_config"]["desc_act"] is False
    g_idx = version_1[1]["model.layers.0.mlp.down_proj.g_idx"]
    assert torch.equal(g_idx, torch.arange(192, dtype=torch.int32) // 32)


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_quantize_config_is_written_twice(exported, name):
    _, out = exported((name, 4, True, "group"))
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    twice = json.loads((out / "quantize_config.json").read_text())
    if name == "gptq":
        assert twice == config
    else:
        assert (twice["w_bit"], twice["q_group_size"], twice["version"]) == (4, 32, "GEMM")
        assert (config["zero_point"], config["version"]) == (True, "gemm")


@pytest.mark.parametrize("name", ["w4-gptq", "w4-awq"])
def test_recipes_of_the_formats_fit_them(quantize, export, tmp_path, name, model):
    ids = torch.randint(640, (4, 48), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    quantize(config_file(name), tmp_path / "native", model=model,
             calibration=tmp_path / "ids.safetensors")
    report = export(tmp_path / "native", name.removeprefix("w4-"), tmp_path / "out")
    assert not any("Kernels" in note for note in report["notes"])


@pytest.fixture(scope="session")
def gptqmodel_python() -> str:
    python = os.environ.get("BASEQ_GPTQMODEL_PYTHON")
    if python is None:
        pytest.skip("BASEQ_GPTQMODEL_PYTHON does not name a Python with gptqmodel: GPTQ and AWQ checkpoints were not run, "
                    "only dequantized")
    return python


@pytest.mark.parametrize("case", [case for case in CASES if case[3] != "tensor"], ids=case_name)
def test_gptqmodel_computes_the_logits_of_the_native_checkpoint(gptqmodel_python, exported, logits_of, tmp_path, case):
    native, out = exported(case)
    ids, expected = logits_of(native, (1, 33))
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    done = subprocess.run([gptqmodel_python, Path(__file__).with_name("gptqmodel_logits.py"), out,
                           tmp_path / "ids.safetensors", tmp_path / "logits.safetensors"], capture_output=True,
                          text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    got = load_file(tmp_path / "logits.safetensors")["logits"].double()
    assert float((got - expected).norm() / expected.double().norm()) < 5e-3  # its kernels compute in float16
