"""Quantized checkpoints have the same logits, to the bit, on every processor (docs/arithmetic.md)."""

import json

import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file

from tiny_runs import TINY, config_file

KERNELS = ["avx512", "avx512-plain", "avxvnni", "avx2", "scalar"]


@pytest.fixture(scope="session")
def logits_with(run, tmp_path_factory):
    """logits_with(model, variables, *options) -> logits of `eval`, or None where the processor lacks the kernels."""
    folder = tmp_path_factory.mktemp("arithmetic")

    def call(model, variables: dict[str, str], *options) -> torch.Tensor | None:
        vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
        ids = torch.randint(vocab_size, (3, 33), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
        save_file({"input_ids": ids.numpy()}, folder / "ids.safetensors")
        done = run("eval", model, "--tokens", folder / "ids.safetensors", "--seq-len", 33, "--logits",
                   folder / "logits.safetensors", "--quiet", *options, variables=variables)
        if "BASEQ_KERNELS" in done.stderr:
            return None
        assert done.returncode == 0, done.stderr
        return load_file(folder / "logits.safetensors")["logits"]

    return call


@pytest.mark.parametrize("recipe", ["baseq-w4a4kv4", "flatquant-w4a4kv4", "gptq-w3a16-g16", "rtn-w8a8"])
def test_logits_are_the_same_bits_for_every_instruction_set(quantize, logits_with, recipe, tmp_path):
    quantize(config_file(recipe), tmp_path / "out")
    expected = logits_with(tmp_path / "out", {})
    assert expected.isfinite().all()
    assert torch.equal(logits_with(tmp_path / "out", {"BASEQ_KERNELS": "scalar"}), expected)
    for kernels in KERNELS:
        got = logits_with(tmp_path / "out", {"BASEQ_KERNELS": kernels})
        assert got is None or torch.equal(got, expected), kernels
    for capability in ("default", "avx2", "avx512"):
        got = logits_with(tmp_path / "out", {"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": "AVX2"})
        assert torch.equal(got, expected), capability
    assert torch.equal(logits_with(tmp_path / "out", {}, "--threads", "2"), expected)


def test_integers_are_near_what_they_stand_for(quantize, logits_with, tmp_path):
    quantize(config_file("gptq-w3a16-g16"), tmp_path / "out")
    simulated = logits_with(tmp_path / "out", {}, "--arithmetic", "float")
    error = {bits: float((logits_with(tmp_path / "out", {}, "--activation-bits", bits) - simulated).norm() /
                         simulated.norm()) for bits in ("8", "15")}
    assert 0 < error["15"] < 1e-3
    assert error["15"] < error["8"] < 0.1


@pytest.mark.parametrize("options, said", [(["--arithmetic", "decimal"], "--arithmetic"),
                                           (["--activation-bits", "9"], "--activation-bits")])
def test_other_arithmetic_is_a_wrong_argument(run, options, said):
    done = run("eval", TINY, "--tokens", "/dev/null", *options)
    assert done.returncode == 2 and said in done.stderr
