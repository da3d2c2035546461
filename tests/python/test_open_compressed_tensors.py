"""Checkpoints that the compressed-tensors package writes: `baseq` computes the logits that its loader computes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import (BIASED, LINEARS, TINY, compressed_tensors, decompressed_logits,  # noqa: F401
                         loaded_logits, relative_error, token_errors)

pytestmark = pytest.mark.usefixtures("compressed_tensors")


def observed(weight: torch.Tensor, args, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Scale and zero point from each group's extremes, by the package's own formula."""
    from compressed_tensors.quantization.utils import calculate_qparams

    grouped = weight.reshape(1, 1, -1) if args.strategy == "tensor" else weight.unsqueeze(1)
    if args.strategy == "group":
        grouped = weight.reshape(weight.shape[0], -1, args.group_size)
    scale, zero_point = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    if args.strategy == "tensor":
        scale, zero_point = scale.reshape(1), zero_point.reshape(1)
    return {"weight_scale": scale.to(dtype), "weight_zero_point": zero_point.to(torch.int8)}


def write(model: Path, folder: Path, groups: dict, ignore: list[str], dtype: torch.dtype = torch.float32,
          extra: dict | None = None) -> Path:
    """`model` with its linears compressed by the package; `groups` maps a name to the fields of its scheme."""
    import compressed_tensors.compressors as compressors
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    config = QuantizationConfig.model_validate({
        "config_groups": groups, "ignore": ignore, "quantization_status": "compressed",
        "format": next(iter(groups.values()))["format"]})
    by_format = {"pack-quantized": compressors.PackedQuantizationCompressor,
                 "int-quantized": compressors.IntQuantizationCompressor,
                 "naive-quantized": compressors.NaiveQuantizationCompressor}
    tensors = load_file(model / "model.safetensors")
    for name in [name.removesuffix(".weight") for name in tensors if "_proj.weight" in name]:
        if any(match_name(name, target) for target in ignore):
            continue
        schemes = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
        exact_first = sorted(schemes, key=lambda target: (target == "Linear", "re:" in target))
        scheme = next(schemes[target] for target in exact_first if target == "Linear" or match_name(name, target))
        parts = {"weight": tensors.pop(f"{name}.weight").float()}
        parts |= observed(parts["weight"], scheme.weights, dtype)
        compressed = by_format[scheme.format].compress(parts, scheme)
        tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in compressed.items()}
        if scheme.input_activations and not scheme.input_activations.dynamic:
            tensors[f"{name}.input_scale"] = torch.tensor([0.04])
            if not scheme.input_activations.symmetric:
                tensors[f"{name}.input_zero_point"] = torch.tensor([11], dtype=torch.int8)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    fields = json.loads((model / "config.json").read_text())
    quantization = json.loads(config.model_dump_json()) | {"version": "0.20.0"} | (extra or {})
    (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": quantization}))
    return folder


def scheme(weights: dict, name: str = "pack-quantized", targets: tuple = ("Linear",), activations=None) -> dict:
    return {"targets": list(targets), "format": name, "weights": {"type": "int"} | weights,
            "input_activations": activations}


GROUP = {"num_bits": 4, "strategy": "group", "group_size": 16}
ALONE = {
    "w4-group": (scheme(GROUP), torch.float32),
    "w4-group-bfloat16": (scheme(GROUP), torch.bfloat16),
    "w3-channel-float16": (scheme({"num_bits": 3, "strategy": "channel"}), torch.float16),
    "w8-tensor": (scheme({"num_bits": 8, "strategy": "tensor"}), torch.float32),
    "int-w8-channel": (scheme({"num_bits": 8, "strategy": "channel"}, "int-quantized"), torch.float32),
    "naive-w4-group": (scheme(GROUP, "naive-quantized"), torch.float32),
}


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("model", [TINY, BIASED], ids=["tied", "untied-bias"])
def test_symmetric_weights_have_the_logits_of_transformers(logits_of, tmp_path, model, name):
    group, dtype = ALONE[name]
    folder = write(model, tmp_path / "out", {"group_0": group}, ["lm_head"], dtype)
    ids, got = logits_of(folder)
    assert relative_error(got, loaded_logits(folder, ids)) < 1e-5
    assert relative_error(got, logits_of(model)[1]) > 1e-3


@pytest.mark.parametrize("weights", [GROUP | {"symmetric": False}, {"num_bits": 8, "strategy": "channel",
                                                                    "symmetric": False}], ids=["w4", "w8"])
def test_asymmetric_weights_have_the_logits_of_the_package(logits_of, tmp_path, weights):
    folder = write(BIASED, tmp_path / "out", {"group_0": scheme(weights)}, ["lm_head"])
    ids, got = logits_of(folder)
    assert relative_error(got, decompressed_logits(folder, ids)) < 1e-5


def test_the_most_exact_target_decides_and_ignored_linears_stay(run, logits_of, export, tmp_path):
    groups = {"others": scheme(GROUP),
              "down": scheme({"num_bits": 8, "strategy": "channel"}, targets=("re:.*down_proj$",)),
              "one": scheme({"num_bits": 3, "strategy": "channel"}, targets=("model.layers.1.mlp.down_proj",))}
    folder = write(TINY, tmp_path / "out", groups, ["lm_head", r"re:.*layers\.0\.self_attn\.(q|k)_proj"])
    tensors = load_file(folder / "model.safetensors")
    assert "model.layers.0.self_attn.q_proj.weight" in tensors
    ids, got = logits_of(folder)
    assert relative_error(got, loaded_logits(folder, ids)) < 1e-5
    export(folder, "hf", tmp_path / "hf", "--dtype", "float32")
    assert relative_error(loaded_logits(tmp_path / "hf", ids), got) < 1e-5
    export(folder, "compressed-tensors", tmp_path / "again", "--dtype", "float32")
    assert relative_error(loaded_logits(tmp_path / "again", ids), got) < 1e-5
    done = run("export", folder, "--format", "gptq", "--dry-run")
    assert done.returncode == 1 and "linears with other grids than the rest, or without one" in done.stderr
    done = run("inspect", folder)
    assert done.returncode == 0 and "full precision: self_attn.q_proj, self_attn.k_proj in block 0\n" in done.stdout
    assert "3 bits, symmetric, per channel: mlp.down_proj in block 1\n" in done.stdout


DYNAMIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
STATIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}


@pytest.mark.parametrize("activations", [DYNAMIC, STATIC, STATIC | {"symmetric": False}],
                         ids=["dynamic", "static", "static-asymmetric"])
def test_quantized_inputs_have_the_logits_of_transformers(logits_of, tmp_path, activations):
    int8 = {"num_bits": 8, "strategy": "channel"}
    folder = write(BIASED, tmp_path / "out", {"group_0": scheme(int8, "int-quantized", activations=activations)},
                   ["lm_head"])
    plain = write(BIASED, tmp_path / "plain", {"group_0": scheme(int8, "int-quantized")}, ["lm_head"])
    # A value halfway between two codes rounds either way in another order of summation.
    ids, got = logits_of(folder, (100, 2))
    assert (token_errors(got, loaded_logits(folder, ids)) < 1e-4).float().mean() > 0.75
    assert (token_errors(logits_of(plain, (100, 2))[1], got) > 1e-3).float().mean() > 0.9


def test_linears_of_one_input_with_different_static_scales_are_refused(run, tmp_path, windows):
    folder = write(TINY, tmp_path / "out", {"group_0": scheme({"num_bits": 8, "strategy": "channel"}, "int-quantized",
                                                              activations=STATIC)}, ["lm_head"])
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.input_scale"] += 0.01
    save_file(tensors, folder / "model.safetensors")
    done = run("eval", folder, "--tokens", windows, "--seq-len", 16)
    assert done.returncode == 1 and "k_proj.input_scale" in done.stderr


def test_words_padded_as_before_version_0_18(logits_of, tmp_path):
    three_bits = {"group_0": scheme({"num_bits": 3, "strategy": "channel"})}
    folder = write(TINY, tmp_path / "dense", three_bits, ["lm_head"])
    padded = tmp_path / "padded"
    shutil.copytree(folder, padded)
    tensors = load_file(padded / "model.safetensors")
    for name in [name for name in tensors if name.endswith("weight_packed")]:
        words = tensors[name].numpy().view(np.uint8)
        columns = int(tensors[name.replace("packed", "shape")][1])
        bits = np.unpackbits(words, axis=1, bitorder="little")[:, : columns * 3].reshape(len(words), columns, 3)
        bits = np.pad(bits, ((0, 0), (0, -columns % 10), (0, 0))).reshape(len(words), -1, 30)
        packed = np.packbits(np.pad(bits, ((0, 0), (0, 0), (0, 2))).reshape(len(words), -1), axis=1, bitorder="little")
        tensors[name] = torch.from_numpy(packed.view(np.int32).copy())
    save_file(tensors, padded / "model.safetensors")
    config = json.loads((padded / "config.json").read_text())
    config["quantization_config"]["version"] = "0.17.1"
    (padded / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits_of(padded)[1], logits_of(folder)[1])


def test_what_was_read_is_exported_again(run, export, logits_of, tmp_path):
    folder = write(TINY, tmp_path / "out", {"group_0": scheme(GROUP)}, ["lm_head"], torch.bfloat16)
    export(folder, "compressed-tensors", tmp_path / "again")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    for name in (f"model.layers.{layer}.{linear}.weight_{part}" for layer in range(2) for linear in LINEARS
                 for part in ("packed", "scale", "shape")):
        assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("change, named", [
    ({"format": "float-quantized"}, "float-quantized"),
    ({"quantization_status": "frozen"}, "frozen"),
    ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    ({"transform_config": {"config_groups": {"R4": {"apply": [{"location": "input"}]}}}}, "online transform"),
    ({"group": {"weights": GROUP | {"type": "float"}}}, "float"),
    ({"group": {"weights": GROUP | {"strategy": "block"}}}, "block"),
    ({"group": {"weights": GROUP | {"surprise": 1}}}, "surprise"),
    ({"group": {"input_activations": DYNAMIC | {"symmetric": False}}}, "asymmetric"),
    ({"group": {"input_activations": DYNAMIC | {"dynamic": "local"}}}, "local"),
    ({"group": {"output_activations": DYNAMIC}}, "output_activations"),
    ({"group": {"targets": ["re:(unclosed"]}}, "unclosed"),
    ({"group": {"weights": GROUP | {"group_size": 32}}}, "weight_scale"),
])
def test_what_is_not_executed_is_refused(run, tmp_path, windows, change, named):
    folder = write(TINY, tmp_path / "out", {"group_0": scheme(GROUP)}, ["lm_head"])
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    quantization["config_groups"]["group_0"] |= change.pop("group", {})
    if "format" in change:
        quantization["config_groups"]["group_0"]["format"] = None
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization | change}))
    done = run("eval", folder, "--tokens", windows, "--seq-len", 16)
    assert done.returncode == 1 and named in done.stderr, done.stderr


def test_transforms_that_are_merged_need_nothing(run, logits_of, tmp_path):
    merged = {"config_groups": {"R1": {"apply": [{"location": "weight_output"}, {"location": "weight_input"}]}}}
    plain = write(TINY, tmp_path / "plain", {"group_0": scheme(GROUP)}, ["lm_head"])
    folder = write(TINY, tmp_path / "out", {"group_0": scheme(GROUP)}, ["lm_head"], extra={"transform_config": merged})
    assert torch.equal(logits_of(folder)[1], logits_of(plain)[1])
