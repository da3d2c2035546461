"""What `baseq quantize` writes, read with the safetensors package, NumPy and transformers."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from native_checkpoint import codes_of, dequantize, read
from safetensors.numpy import load_file

from tiny_runs import GPTQ, ROUND, RTN, config_file, hadamard, recipe_of, steps_of

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "data" / "tiny_llama_base"
CONFIGS = sorted((ROOT / "configs").glob("*/*.json"))
SCALE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")


def linear_names() -> list[str]:
    return [f"model.layers.{layer}.{name}" for layer in range(2) for name in LINEARS]


def round_to_nearest(weight: np.ndarray, spec: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scale and zero point from the range of each group, written from docs/format.md."""
    groups = {"tensor": weight.reshape(1, 1, -1),
              "channel": weight.reshape(weight.shape[0], 1, -1),
              "group": weight.reshape(weight.shape[0], -1, spec.get("group_size") or 1)}[spec["strategy"]]
    low_code, high_code = -(2 ** (spec["num_bits"] - 1)), 2 ** (spec["num_bits"] - 1) - 1
    steps = np.float32(high_code - low_code)
    high, low = groups.max(-1), groups.min(-1)

    def stored(scale):
        return torch.from_numpy(scale).to(SCALE_DTYPES[spec.get("scale_dtype", "float32")]).float().numpy()

    if spec["symmetric"]:
        scale, zero_point = stored(np.maximum(high, -low) / (steps / 2)), np.zeros_like(high)
    else:
        high, low = np.maximum(high, 0), np.minimum(low, 0)
        scale = stored((high - low) / steps)
        zero_point = np.clip(np.rint(low_code - low / scale), low_code, high_code)
    codes = np.clip(np.rint(groups / scale[..., None] + zero_point[..., None]), low_code, high_code)
    return codes.reshape(weight.shape).astype(np.int64), scale, zero_point


@pytest.mark.parametrize("num_bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("grid", [
    {"symmetric": True, "strategy": "channel"},
    {"symmetric": False, "strategy": "channel", "scale_dtype": "float16"},
    {"symmetric": True, "strategy": "group", "group_size": 32, "scale_dtype": "bfloat16"},
    {"symmetric": False, "strategy": "group", "group_size": 16},
    {"symmetric": True, "strategy": "tensor"},
    {"symmetric": False, "strategy": "tensor"},
], ids=["channel", "channel-asymmetric", "group", "group-asymmetric", "tensor", "tensor-asymmetric"])
def test_rounded_weights_equal_those_of_numpy(quantize, tmp_path, num_bits, grid):
    spec = {"num_bits": num_bits, **grid}
    quantize(recipe_of(ROUND | {"clip": "none"}, weights=spec), tmp_path / "out")
    _, tensors = read(tmp_path / "out")
    originals = load_file(TINY / "model.safetensors")
    for name in linear_names():
        codes, scale, zero_point = codes_of(tensors, name, spec)
        expected_codes, expected_scale, expected_zero_point = round_to_nearest(originals[f"{name}.weight"], spec)
        np.testing.assert_array_equal(scale, expected_scale, err_msg=name)
        np.testing.assert_array_equal(zero_point, expected_zero_point, err_msg=name)
        # x / scale in float32 may land on either side of a tie.
        differing = codes != expected_codes
        assert differing.mean() <= 1e-3 and np.abs(codes - expected_codes).max() <= 1, name


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_runs(quantize, evaluate, tmp_path, config):
    written = json.loads(config.read_text())
    overrides = {f"{path}.epochs": 1 for path, step in steps_of(written) if step["step"] == "learn"}
    blocks = [path for path, step in steps_of(written) if step["step"] == "transform" and "block_size" in step]
    overrides |= {f"{path}.block_size": 32 for path in blocks}
    if written.get("grids", {}).get("weights", {}).get("strategy") == "group":
        overrides["grids.weights.group_size"] = 32
    report = quantize(config, tmp_path / "out", overrides)
    assert written["name"] == config.stem
    assert report["recipe"]["name"] == config.stem
    assert len(report["blocks"]) == 2
    result = evaluate(tmp_path / "out", "--reference", TINY)
    assert np.isfinite(result["perplexity"])
    assert 0 <= result["top1_agreement"] <= 1
    assert result["mean_kl"] >= -1e-6


def test_config_names_the_format_and_the_resolved_recipe(quantize, tmp_path):
    quantize(config_file("rtn-w4a4kv4"), tmp_path / "out")
    config, tensors = read(tmp_path / "out")
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "baseq"
    assert quantization["format_version"] == 5
    assert quantization["weights"]["num_bits"] == 4
    assert quantization["input_activations"] == {
        "num_bits": 4, "symmetric": False, "strategy": "token", "dynamic": True, "scale_dtype": "float32"}
    assert quantization["kv_cache"]["group_size"] == config["head_dim"]
    assert not any(".transform." in name for name in tensors)
    assert quantization["recipe"]["calibration"]["num_samples"] == 4, "overrides belong to the resolved recipe"
    for name in linear_names():
        assert f"{name}.weight" not in tensors
        assert tensors[f"{name}.weight_packed"].dtype == torch.int32
        assert tensors[f"{name}.weight_shape"].dtype == torch.int64


def test_online_transforms_are_tensors_of_every_block(quantize, run, tmp_path):
    quantize(recipe_of(hadamard("qkv", "gate_up", "query_key", "down"), ROUND, weights={"num_bits": 4}),
             tmp_path / "out")
    _, tensors = read(tmp_path / "out")
    expected = {"self_attn.input_quant": [64, 1], "mlp.input_quant": [64, 1], "self_attn.k_cache_quant": [16, 1],
                "mlp.down_proj.input_quant": [96, 1]}
    stored = {name: tensor for name, tensor in tensors.items() if ".transform." in name}
    assert {name: tensor.tolist() for name, tensor in stored.items()} == {
        f"model.layers.{layer}.{point}.transform.0.hadamard": sizes
        for layer in range(2) for point, sizes in expected.items()}
    assert {tensor.dtype for tensor in stored.values()} == {torch.int64}
    shown = run("inspect", tmp_path / "out")
    assert "online        hadamard at qkv, query_key, gate_up, down\n" in shown.stdout
    assert "online        nothing" not in shown.stdout


def test_resolved_recipe_makes_the_same_checkpoint(quantize, tmp_path):
    quantize(config_file("quarot-w4a4kv4"), tmp_path / "first")
    config, _ = read(tmp_path / "first")
    quantize(config["quantization_config"]["recipe"], tmp_path / "second")
    assert digests(tmp_path / "first") == digests(tmp_path / "second")


def test_every_recipe_key_is_documented(quantize, tmp_path):
    page = (ROOT / "docs" / "recipes.md").read_text()
    for name in ("baseq-w4a4kv4", "fbquant-block-w3a16-g64-r16", "smoothquant-w8a8", "two-pass-w4a4kv4"):
        path = config_file(name)
        overrides = {f"{step}.epochs": 0 for step, settings in steps_of(json.loads(path.read_text()))
                     if settings["step"] == "learn"} | ({"grids.weights.group_size": 32} if "g64" in name else {})
        resolved = quantize(path, tmp_path / name, overrides)["recipe"]
        parts = [resolved, resolved["calibration"], resolved["grids"], *filter(None, resolved["grids"].values())]
        for _, step in steps_of(resolved):
            parts += [step, step.get("low_rank") or {}]
        for key in {key for part in parts for key in part}:
            assert f"`{key}`" in page, f"{name}: {key}"


def digests(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "quantization_log.jsonl"}


def test_two_runs_write_the_same_bytes(quantize, tmp_path):
    config = config_file("baseq-w4a4kv4")
    overrides = {f"{path}.epochs": 2 for path, step in steps_of(json.loads(config.read_text())) if step["step"] == "learn"}
    for name in ("first", "second"):
        quantize(config, tmp_path / name, overrides, extra=("--seed", "7"))
    assert digests(tmp_path / "first") == digests(tmp_path / "second")


def test_sharded_checkpoint_is_read(quantize, tmp_path):
    quantize(RTN, tmp_path / "out", model=ROOT / "tests" / "data" / "tiny_llama_sharded")
    _, tensors = read(tmp_path / "out")
    assert {f"{name}.weight_packed" for name in linear_names()} <= set(tensors)


# ---- perplexity beside transformers


def reference_model(tensors: dict | None = None) -> transformers.LlamaForCausalLM:
    model = transformers.LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    if tensors:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        assert not unexpected
    return model.eval()


def reference_perplexity(model, windows: Path) -> float:
    ids = torch.from_numpy(load_file(windows)["input_ids"]).long()
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    return float(loss.exp())


def test_perplexity_equals_that_of_transformers(evaluate, windows):
    result = evaluate(TINY)
    assert result["perplexity"] == pytest.approx(reference_perplexity(reference_model(), windows), rel=1e-5)
    assert result["num_tokens"] == 4 * 47


@pytest.mark.parametrize("spec", [
    {"num_bits": 3, "symmetric": False, "strategy": "group", "group_size": 16},
    {"num_bits": 4, "symmetric": True, "strategy": "channel"},
    {"num_bits": 6, "symmetric": False, "strategy": "tensor"},
], ids=["group", "channel", "tensor"])
def test_quantized_weights_run_as_transformers_runs_them(quantize, evaluate, windows, tmp_path, spec):
    quantize(recipe_of(GPTQ, weights=spec), tmp_path / "out")
    _, tensors = read(tmp_path / "out")
    dense = {f"{name}.weight": torch.from_numpy(dequantize(tensors, name, spec)) for name in linear_names()}
    expected = reference_perplexity(reference_model(dense), windows)
    assert evaluate(tmp_path / "out", "--arithmetic", "float")["perplexity"] == pytest.approx(expected, rel=1e-5)
    # Inputs have 15 bits, keys and values are float16.
    assert evaluate(tmp_path / "out")["perplexity"] == pytest.approx(expected, rel=3e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_quantized_activations_run_as_transformers_runs_them(quantize, evaluate, windows, tmp_path, symmetric):
    spec = {"num_bits": 8, "symmetric": True, "strategy": "channel"}
    clip = 0.9
    quantize(recipe_of({"step": "points", "at": ["*"], "clip": clip}, ROUND | {"clip": "none"}, weights=spec,
                    inputs={"num_bits": 8, "symmetric": symmetric}), tmp_path / "out")
    _, tensors = read(tmp_path / "out")
    dense = {f"{name}.weight": torch.from_numpy(dequantize(tensors, name, spec)) for name in linear_names()}
    model = reference_model(dense)

    def fake_quantize(_, inputs):
        (x,) = inputs
        high, low = x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)
        if symmetric:
            scale = clip * torch.maximum(high, -low) / 127.5
            return ((x / scale).round().clamp(-128, 127) * scale,)
        middle, half = (high + low) / 2, clip * (high - low) / 2
        scale = 2 * half / 255
        return (((x - (middle - half)) / scale).round().clamp(0, 255) * scale + middle - half,)

    for name in linear_names():
        model.get_submodule(name).register_forward_pre_hook(fake_quantize)
    expected = reference_perplexity(model, windows)
    assert expected != pytest.approx(reference_perplexity(reference_model(dense), windows), rel=1e-6)
    assert evaluate(tmp_path / "out", "--arithmetic", "float")["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert evaluate(tmp_path / "out")["perplexity"] == pytest.approx(expected, rel=5e-3)


def test_rotated_model_keeps_its_perplexity(quantize, evaluate, tmp_path):
    quantize(config_file("rotated"), tmp_path / "out")
    config, tensors = read(tmp_path / "out")
    assert config["tie_word_embeddings"] is False
    assert "lm_head.weight" in tensors
    result = evaluate(tmp_path / "out", "--reference", TINY)
    assert result["perplexity"] == pytest.approx(evaluate(TINY)["perplexity"], rel=1e-5)
    assert result["mean_kl"] == pytest.approx(0, abs=1e-6)
    assert result["top1_agreement"] == 1
