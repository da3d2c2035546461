"""GPTQ and AWQ checkpoints, written here with NumPy from the published layouts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import TINY, compressed_tensors, loaded_logits, relative_error  # noqa: F401

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def pack_rows(codes: np.ndarray, num_bits: int) -> np.ndarray:
    """Codes [rows, columns] -> words [rows * num_bits / 32, columns]: a stream of bits down every column."""
    bits = (codes.T[..., None] >> np.arange(num_bits)) & 1
    return np.packbits(bits.reshape(codes.shape[1], -1).astype(np.uint8), axis=1, bitorder="little").view(np.int32).T


def pack_awq(codes: np.ndarray) -> np.ndarray:
    """[rows, columns] -> [rows, columns / 8]."""
    grouped = codes.reshape(codes.shape[0], -1, 8)[..., AWQ_ORDER].astype(np.uint32)
    return (grouped << (4 * np.arange(8, dtype=np.uint32))).sum(-1, dtype=np.uint32).view(np.int32)


def write(folder: Path, num_bits: int = 4, group_size: int = 16, symmetric: bool = True, order: bool = False,
          method: str = "gptq", config: dict | None = None) -> Path:
    """Random codes, scales and zero points in the layout of `method`, and beside them `expected`, the same model with
    the weights that they stand for."""
    random = np.random.default_rng(num_bits)
    tensors = load_file(TINY / "model.safetensors")
    plain = dict(tensors)
    for name in [name.removesuffix(".weight") for name in tensors if "_proj.weight" in name]:
        out_features, in_features = tensors.pop(f"{name}.weight").shape
        groups = in_features // group_size if group_size > 0 else 1
        codes = random.integers(0, 2**num_bits, (in_features, out_features))
        middle = 2 ** (num_bits - 1)
        zeros = np.full((groups, out_features), middle)
        if not symmetric:  # version 1 cannot store 0, but the one past the largest code
            zeros = random.integers(1, 2**num_bits, (groups, out_features))
        scales = (0.02 * random.random((groups, out_features)) + 0.005).astype(np.float16)
        index = np.arange(in_features) // (in_features // groups)
        if order:
            index = random.permutation(index)
        weight = (codes - zeros[index]).astype(np.float32) * scales[index].astype(np.float32)
        plain[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(weight.T))
        if method == "awq":
            stored = {"qweight": pack_awq(codes), "qzeros": pack_awq(zeros), "scales": scales}
        else:
            less = 0 if (config or {}).get("checkpoint_format") == "gptq_v2" else 1
            stored = {"qweight": pack_rows(codes, num_bits), "qzeros": pack_rows((zeros - less).T, num_bits).T,
                      "scales": scales, "g_idx": index.astype(np.int32)}
        tensors |= {f"{name}.{key}": torch.from_numpy(np.ascontiguousarray(array)) for key, array in stored.items()}
    fields = json.loads((TINY / "config.json").read_text())
    for path, parts in ((folder, tensors), (folder / "expected", plain)):
        path.mkdir()
        save_file(parts, path / "model.safetensors", {"format": "pt"})
        (path / "config.json").write_text(json.dumps(fields))
    fields["quantization_config"] = {"quant_method": method, "bits": num_bits, "group_size": group_size,
                                     "desc_act": order, "sym": symmetric} | (config or {})
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("config", [{}, {"checkpoint_format": "gptq"}, {"checkpoint_format": "gptq_v2"}],
                         ids=["unnamed", "v1", "v2"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("order", [False, True], ids=["in-order", "desc-act"])
@pytest.mark.parametrize("num_bits, group_size", [(2, 16), (3, 16), (4, 16), (8, 16), (4, -1)])
def test_gptq_has_the_logits_of_the_dequantized_model(logits_of, tmp_path, num_bits, group_size, order, symmetric,
                                                      config):
    folder = write(tmp_path / "out", num_bits, group_size, symmetric, order, config=config)
    ids, got = logits_of(folder)
    assert relative_error(got, loaded_logits(folder / "expected", ids)) < 1e-5


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_awq_has_the_logits_of_the_dequantized_model(logits_of, tmp_path, symmetric):
    folder = write(tmp_path / "out", symmetric=symmetric, method="awq",
                   config={"version": "GEMM", "zero_point": True, "modules_to_not_convert": None})
    ids, got = logits_of(folder)
    assert relative_error(got, loaded_logits(folder / "expected", ids)) < 1e-5


def test_codes_in_order_become_compressed_tensors(compressed_tensors, run, export, logits_of, tmp_path):
    folder = write(tmp_path / "out", symmetric=True)
    export(folder, "compressed-tensors", tmp_path / "again", "--dtype", "float16")
    ids, got = logits_of(folder)
    # Embedding and norms are rounded to float16.
    assert relative_error(loaded_logits(tmp_path / "again", ids), got) < 1e-2
    done = run("inspect", folder)
    assert done.returncode == 0 and "format        gptq" in done.stdout and "per group of 16" in done.stdout


def test_scattered_columns_are_exported_dequantized_alone(run, export, logits_of, tmp_path):
    folder = write(tmp_path / "out", order=True)
    done = run("export", folder, "--format", "compressed-tensors", "--dry-run")
    assert done.returncode == 1 and "scattered columns" in done.stderr
    export(folder, "hf", tmp_path / "hf", "--dtype", "float32")
    ids, got = logits_of(folder)
    assert relative_error(loaded_logits(tmp_path / "hf", ids), got) < 1e-5


def test_the_configuration_of_autogptq_beside_config_json_counts(logits_of, tmp_path):
    folder = write(tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 16, "sym": True}))
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items()
                                                    if key != "quantization_config"}))
    ids, got = logits_of(folder)
    assert relative_error(got, loaded_logits(folder / "expected", ids)) < 1e-5


@pytest.mark.parametrize("method, change, named", [
    ("gptq", {"bits": 5}, "5 bits"), ("gptq", {"checkpoint_format": "marlin"}, "marlin"),
    ("gptq", {"group_size": 0}, "group_size"), ("gptq", {"dynamic": {"+:.*down": {"bits": 8}}}, "dynamic"),
    ("gptq", {"pack_dtype": "int16"}, "int16"), ("gptq", {"bits": 8}, "scale"),
    ("awq", {"version": "gemv"}, "gemv"), ("awq", {"bits": 8}, "8 bits"),
])
def test_other_layouts_are_refused(run, tmp_path, windows, method, change, named):
    folder = write(tmp_path / "out", method=method, config=change)
    done = run("eval", folder, "--tokens", windows, "--seq-len", 16)
    assert done.returncode == 1 and named in done.stderr, done.stderr


@pytest.mark.parametrize("name, tensor, named", [
    ("g_idx", torch.full((96,), 7, dtype=torch.int32), "g_idx"), ("g_idx", torch.arange(5), "g_idx"),
    ("qweight", torch.zeros(3, dtype=torch.int32), "qweight"), ("scales", torch.zeros(3, 3), "down_proj"),
    ("qzeros", torch.zeros(1, 1, dtype=torch.int32), "down_proj"),
])
def test_tensors_of_other_shapes_are_refused_by_name(run, tmp_path, windows, name, tensor, named):
    folder = write(tmp_path / "out", symmetric=False, order=True)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.1.mlp.down_proj.{name}"] = tensor
    save_file(tensors, folder / "model.safetensors")
    done = run("eval", folder, "--tokens", windows, "--seq-len", 16)
    assert done.returncode == 1 and named in done.stderr, done.stderr


