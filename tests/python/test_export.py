"""`baseq export`: what it writes is loaded by the programs that it is written for and computes the same logits."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from native_checkpoint import dequantize, read
from safetensors.torch import load_file, save_file

from tiny_runs import POINTS, ROUND, config_file, hadamard, recipe_of

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
TINY, BIASED = DATA / "tiny_llama_base", DATA / "tiny_llama_untied_bias"
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")
GRID = {"num_bits": 4, "strategy": "group", "group_size": 16, "scale_dtype": "bfloat16"}
WEIGHT_ONLY = recipe_of(ROUND, weights=GRID)


def loaded_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        return model.eval()(ids).logits


def decompressed_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """The same with the package's own decompression in a plain model: transformers 4.57 prepares a model for zero
    points that are not packed and refuses every asymmetric checkpoint of compressed-tensors 0.20, whoever wrote it."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config, tensors = read(folder)
    scheme = QuantizationConfig.model_validate(config.pop("quantization_config")).config_groups["group_0"]
    for name in sorted(name.removesuffix("_packed") for name in tensors if name.endswith(".weight_packed")):
        parts = {key: tensors.pop(f"{name[:-6]}{key}") for key in ("weight_packed", "weight_scale", "weight_shape",
                                                                   "weight_zero_point")}
        tensors[name] = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).float()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and all(name == "lm_head.weight" for name in missing)
    with torch.no_grad():
        return model.eval()(ids).logits


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def token_errors(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (got - expected).norm(dim=-1) / expected.norm(dim=-1)


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


# ---- hf


@pytest.mark.parametrize("model", [TINY, BIASED], ids=["tied", "untied-bias"])
@pytest.mark.parametrize("transforms", [[], [hadamard("residual", "value", "query_key", "o", "down")],
                                        [hadamard("qkv", "gate_up", "down")]], ids=["plain", "rotated", "online"])
def test_hf_has_the_logits_of_the_native_checkpoint(round_off, export, logits_of, tmp_path, model, transforms):
    round_off(recipe_of(*transforms, ROUND, weights=GRID, dtype="float32"), tmp_path / "native", model=model)
    export(tmp_path / "native", "hf", tmp_path / "hf", "--dtype", "float32")
    ids, expected = logits_of(tmp_path / "native")
    assert relative_error(expected, logits_of(model)[1]) > 1e-3
    assert relative_error(loaded_logits(tmp_path / "hf", ids), expected) < 1e-5


def test_hf_of_an_unquantized_checkpoint_changes_the_dtype_alone(export, tmp_path):
    export(TINY, "hf", tmp_path / "hf")
    config, tensors = read(tmp_path / "hf")
    originals = load_file(TINY / "model.safetensors")
    assert config == json.loads((TINY / "config.json").read_text()) | {"dtype": "bfloat16"}
    assert tensors.keys() == originals.keys()
    assert all(torch.equal(tensors[name], originals[name].bfloat16()) for name in originals)


def test_hf_weights_are_the_dequantized_ones(round_off, export, tmp_path):
    round_off(WEIGHT_ONLY, tmp_path / "native")
    export(tmp_path / "native", "hf", tmp_path / "hf")
    native_config, native = read(tmp_path / "native")
    config, tensors = read(tmp_path / "hf")
    assert "quantization_config" not in config
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    for name in (f"model.layers.{layer}.{linear}" for layer in range(2) for linear in LINEARS):
        weight = dequantize(native, name, native_config["quantization_config"]["weights"])
        assert torch.equal(tensors[f"{name}.weight"], torch.from_numpy(weight).bfloat16()), name


# ---- compressed-tensors


@pytest.fixture(scope="session")
def compressed_tensors():
    return pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed: its loader is the "
                               "proof of the compressed-tensors format; pip install -r tests/requirements.txt")


GRIDS = [{"num_bits": bits, "symmetric": True, "strategy": "group", "group_size": 16} for bits in range(2, 9)]
GRIDS += [{"num_bits": bits, "symmetric": True, "strategy": "channel"} for bits in (3, 4, 8)]
GRIDS += [{"num_bits": bits, "symmetric": False, "strategy": "group", "group_size": 8} for bits in (4, 8)]
GRIDS += [{"num_bits": bits, "symmetric": False, "strategy": "channel"} for bits in (4, 8)]
GRIDS += [{"num_bits": 4, "symmetric": True, "strategy": "tensor"}, {"num_bits": 4, "symmetric": False,
                                                                     "strategy": "tensor"}]


def grid_name(grid: dict) -> str:
    return f"w{grid['num_bits']}-{grid['strategy']}{'' if grid['symmetric'] else '-asymmetric'}"


@pytest.mark.parametrize("grid", GRIDS, ids=grid_name)
def test_pack_quantized_has_the_logits_of_the_native_checkpoint(compressed_tensors, round_off, export, logits_of,
                                                                tmp_path, grid):
    model = BIASED if grid["strategy"] == "group" else TINY
    round_off(recipe_of(hadamard("residual"), ROUND, weights=grid, dtype="float32"), tmp_path / "native", model=model)
    export(tmp_path / "native", "compressed-tensors", tmp_path / "out", "--dtype", "float32")
    config, tensors = read(tmp_path / "out")
    assert config["quantization_config"]["format"] == "pack-quantized"
    assert ("model.layers.0.mlp.up_proj.weight_zero_point" in tensors) != grid["symmetric"]
    ids, expected = logits_of(tmp_path / "native")
    load = loaded_logits if grid["symmetric"] else decompressed_logits
    assert relative_error(load(tmp_path / "out", ids), expected) < 1e-5


@pytest.mark.parametrize("weights, activations, storage", [(8, 8, "int-quantized"), (4, 8, "pack-quantized"),
                                                           (4, 4, "pack-quantized")])
def test_quantized_activations_are_those_of_the_native_checkpoint(compressed_tensors, round_off, export, logits_of,
                                                                  tmp_path, weights, activations, storage):
    grid, inputs = {"num_bits": weights}, {"num_bits": activations, "symmetric": True}
    round_off(recipe_of(POINTS, ROUND, weights=grid, inputs=inputs, dtype="float32"), tmp_path / "native", model=BIASED)
    export(tmp_path / "native", "compressed-tensors", tmp_path / "out", "--dtype", "float32")
    config, tensors = read(tmp_path / "out")
    assert config["quantization_config"]["format"] == storage
    if storage == "int-quantized":
        assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    # A value halfway between two codes rounds either way in another order of summation, and a scale of absmax / 7.5
    # puts the largest value there: short windows, and all tokens but those must agree.
    ids, expected = logits_of(tmp_path / "native", (100, 2))
    got = loaded_logits(tmp_path / "out", ids)
    assert (token_errors(got, expected) < 1e-4).float().mean() > 0.75
    round_off(recipe_of(ROUND, weights=grid, dtype="float32"), tmp_path / "weights-alone", model=BIASED)
    assert (token_errors(logits_of(tmp_path / "weights-alone", (100, 2))[1], expected) > 1e-3).all()


OVERRIDES = [{"linears": ["*.down_proj"], "weights": {"num_bits": 8, "strategy": "channel"}},
             {"linears": ["re:.*layers\\.0\\.self_attn"], "weights": None},
             {"linears": ["*.1.*.o_proj"], "weights": {"num_bits": 3}}]


@pytest.mark.parametrize("inputs", [None, {"num_bits": 8, "symmetric": True}], ids=["weights", "inputs"])
def test_different_grids_are_groups_and_ignored_linears(compressed_tensors, round_off, export, logits_of, tmp_path,
                                                        inputs):
    # Inputs of ignored linears cannot be quantized. Codes of 8 bits a channel are then bytes, the others words.
    overrides = [item for item in OVERRIDES if item["weights"] or not inputs]
    steps = [POINTS, ROUND] if inputs else [ROUND]
    round_off(recipe_of(*steps, weights=GRID, inputs=inputs, overrides=overrides, dtype="float32"), tmp_path / "native",
              model=BIASED)
    export(tmp_path / "native", "compressed-tensors", tmp_path / "out", "--dtype", "float32")
    config, tensors = read(tmp_path / "out")
    assert config["quantization_config"]["format"] == ("mixed-precision" if inputs else "pack-quantized")
    assert len(config["quantization_config"]["config_groups"]) == 3
    assert ("model.layers.0.self_attn.q_proj.weight" in tensors) == (not inputs)
    ids, expected = logits_of(tmp_path / "native", (100, 2))
    got = loaded_logits(tmp_path / "out", ids)
    if inputs:
        assert (token_errors(got, expected) < 1e-4).float().mean() > 0.75
    else:
        assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("name", ["w4a16-vllm", "w8a8-vllm"])  # of w4a4-vllm: the test above
def test_recipes_of_the_profiles_are_exported_in_bfloat16(compressed_tensors, quantize, export, logits_of, tmp_path,
                                                          name):
    overrides = {"grids.weights.group_size": 32} if name == "w4a16-vllm" else {}
    quantize(config_file(name), tmp_path / "native", overrides)
    export(tmp_path / "native", "compressed-tensors", tmp_path / "out")
    ids, expected = logits_of(tmp_path / "native")
    # Norms and the other vectors are rounded to bfloat16.
    assert relative_error(loaded_logits(tmp_path / "out", ids), expected) < 2e-2


def transformed_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """transformers ignores transform_config: the compressed-tensors package attaches the online transforms. The weights
    are transformed already, so those of location weight_input stay out."""
    from compressed_tensors.transform import TransformConfig, apply_transform_config

    config, tensors = read(folder)
    transforms = config["quantization_config"]["transform_config"]
    for group in transforms["config_groups"].values():
        group["apply"] = [apply for apply in group["apply"] if apply["location"] == "input"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    apply_transform_config(model, TransformConfig.model_validate(transforms))
    matrices = {name: tensor for name, tensor in tensors.items() if name.endswith("_input.weight")}
    unexpected = model.load_state_dict(matrices, strict=False).unexpected_keys
    assert not unexpected
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize("activations", [None, {"num_bits": 4, "symmetric": True}], ids=["w4a16", "w4a4"])
@pytest.mark.parametrize("places, types", [
    (("down",), {"down": "random-hadamard"}),  # 96 inputs
    (("o", "down"), {"o": "hadamard", "down": "random-hadamard"}),  # 64 and 96
    (("qkv", "gate_up"), {"qkv": "hadamard", "gate_up": "hadamard"}),
], ids=str)
def test_online_transforms_are_those_of_compressed_tensors(compressed_tensors, round_off, export, logits_of, tmp_path,
                                                           places, types, activations):
    round_off(recipe_of(hadamard(*places), POINTS, ROUND, weights=GRID, inputs=activations, dtype="float32"),
              tmp_path / "native")
    report = export(tmp_path / "native", "compressed-tensors", tmp_path / "out", "--dtype", "float32")
    groups = report["config"]["quantization_config"]["transform_config"]["config_groups"]
    assert {name: group["type"] for name, group in groups.items()} == types
    assert report["config"]["quantization_config"]["format"] == "pack-quantized", "the default for W4A4 is int8"
    assert any("transformers ignores" in note for note in report["notes"])
    assert "garbage" in (tmp_path / "out" / "README.md").read_text()
    ids, expected = logits_of(tmp_path / "native", (100, 2))
    got = transformed_logits(tmp_path / "out", ids)
    if activations:
        # Ties as above: a lowest value of 7.5 steps rounds either way after a transform summed in another order.
        assert (token_errors(got, expected) < 1e-5).float().mean() > 0.4
    else:
        assert relative_error(got, expected) < 1e-5
    with torch.no_grad():
        ignored = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
    assert (token_errors(ignored, expected) > 0.1).all(), "who ignores them computes garbage"


# ---- the preflight and the files


SYMMETRIC = {"num_bits": 8, "symmetric": True}


@pytest.mark.parametrize("name, method, parts", [
    ("hf", recipe_of(POINTS, ROUND, weights=GRID, inputs=SYMMETRIC), ["activations", "w4a16-vllm"]),
    ("hf", recipe_of(POINTS, ROUND, weights=GRID, cache={"num_bits": 4}), ["cache", "grids.kv_cache"]),
    ("compressed-tensors", recipe_of(POINTS, ROUND, weights=GRID, cache={"num_bits": 4}), ["cache", "w4a16-vllm"]),
    ("gptq", recipe_of(hadamard("down"), ROUND, weights=GRID), ["down_proj input (site down)", "w4-gptq"]),
    ("gptq", recipe_of(hadamard("qkv", "gate_up", "o"), ROUND, weights=GRID), ["site qkv", "site o", "site gate_up"]),
    ("gptq", recipe_of(ROUND, weights={"num_bits": 6}), ["weights of 6 bits", "float32 scales", "w4-gptq"]),
    ("gptq", recipe_of(POINTS, ROUND, weights=GRID, inputs={"num_bits": 8}, cache={"num_bits": 4}), ["activations", "cache"]),
    ("awq", recipe_of(ROUND, weights={"num_bits": 8}), ["weights of 8 bits", "w4-awq", "gptq"]),
    ("awq", recipe_of(), ["full precision", "hf"]),
    ("compressed-tensors", recipe_of(POINTS, ROUND, weights=GRID, inputs={"num_bits": 8}),
     ["asymmetric activations", "w8a8-vllm"]),
    ("compressed-tensors", recipe_of(POINTS, ROUND, weights=GRID, inputs={"num_bits": 4}),
     ["asymmetric activations", "w4a4-vllm"]),
    ("compressed-tensors", recipe_of(POINTS | {"clip": 0.9}, ROUND, weights=GRID, inputs=SYMMETRIC), ["clip ratios"]),
    ("compressed-tensors", recipe_of(POINTS | {"shift": "mean"}, ROUND, weights=GRID, inputs=SYMMETRIC), ["shifts"]),
    ("compressed-tensors", recipe_of(ROUND, weights={"num_bits": 3, "symmetric": False}), ["asymmetric weights of 3 bits"]),
    ("compressed-tensors", recipe_of(ROUND, weights={"num_bits": 4}), ["scale", "--dtype float32"]),
    ("compressed-tensors", recipe_of(), ["full precision", "hf"]),
])
def test_what_a_format_cannot_carry_is_refused_in_one_sentence(run, quantize, tmp_path, name, method, parts):
    quantize(method, tmp_path / "native")
    for option in (("--output", tmp_path / "out"), ("--dry-run",)):
        done = run("export", tmp_path / "native", "--format", name, *option)
        assert done.returncode == 1
        assert len(done.stderr.strip().splitlines()) == 1
        assert all(part in done.stderr for part in parts), done.stderr
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_dir()) == ["native"]


@pytest.mark.parametrize("name", ["hf", "compressed-tensors"])
def test_dry_run_says_what_is_written(run, round_off, export, tmp_path, name):
    round_off(recipe_of(hadamard("residual"), ROUND, weights=GRID), tmp_path / "native", model=BIASED)
    done = run("export", tmp_path / "native", "--format", name, "--dry-run", "--json", tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out").exists()
    plan = json.loads((tmp_path / "plan.json").read_text())
    report = export(tmp_path / "native", name, tmp_path / "out")
    assert plan["tensors"] == report["tensors"]
    _, tensors = read(tmp_path / "out")
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "I32": torch.int32, "I64": torch.int64, "I8": torch.int8}
    planned = {tensor["name"]: (dtypes[tensor["dtype"]], tensor["shape"]) for tensor in plan["tensors"]}
    assert planned == {key: (tensor.dtype, list(tensor.shape)) for key, tensor in tensors.items()}
    assert plan["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    for tensor in plan["tensors"]:
        assert f"{tensor['name']} " in done.stdout


def test_side_files_are_copied_and_shards_stay_below_their_size(round_off, export, run, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(TINY, source)
    big = {"model.embed_tokens.weight": torch.randn(40000, 64), "model.rotary_emb.inv_freq": torch.randn(20000, 16)}
    save_file(load_file(source / "model.safetensors") | big, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": 40000}))
    (source / "tokenizer_config.json").write_bytes(b'{"eos_token":  "<|im_end|>"}\r\n')
    export(source, "hf", tmp_path / "one", "--shard-size", "3")
    export(source, "hf", tmp_path / "two", "--shard-size", "3")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert (tmp_path / "one" / "tokenizer_config.json").read_bytes() == b'{"eos_token":  "<|im_end|>"}\r\n'
    shards = sorted((tmp_path / "one").glob("model-*.safetensors"))
    assert len(shards) == 2
    assert [len(load_file(shard)) for shard in shards].count(1) == 1, "only a tensor on its own may be larger"
    done = run("export", source, "--format", "hf", "--output", tmp_path / "one")
    assert done.returncode == 1
    assert "--force" in done.stderr


def test_misuse_exits_with_2(run, tmp_path):
    assert run("export", TINY, "--format", "onnx", "--output", tmp_path / "out").returncode == 2
    assert run("export", TINY, "--format", "hf").returncode == 2
    assert run("export", TINY, "--output", tmp_path / "out").returncode == 2
