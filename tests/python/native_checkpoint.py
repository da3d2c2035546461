"""The native format of docs/format.md read a second time, with NumPy and nothing of baseq."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

# The flags of versions 3 and 4 and the points before which each puts a Hadamard transform.
FLAGS = {"input": ("self_attn.input_quant", "mlp.input_quant"), "query_key": ("self_attn.k_cache_quant",),
         "o": ("self_attn.o_proj.input_quant",), "down": ("mlp.down_proj.input_quant",)}


def read(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """config.json and all tensors."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return json.loads((folder / "config.json").read_text()), tensors


def make_older(folder: Path, version: int) -> Path:
    """Turns a checkpoint in one file into what versions 3 and 4 stored: flags in place of Hadamard transforms."""
    config, tensors = read(folder)
    transforms = {name for name in tensors if ".transform." in name}
    assert all(name.endswith(".transform.0.hadamard") for name in transforms)
    online = {flag: all(f"model.layers.0.{point}.transform.0.hadamard" in transforms for point in points)
              for flag, points in FLAGS.items()}
    config["quantization_config"] |= {"format_version": version, "online_hadamard": online}
    (folder / "config.json").write_text(json.dumps(config))
    kept = {name: tensor for name, tensor in tensors.items() if name not in transforms}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def unpack(packed: np.ndarray, num_bits: int, columns: int) -> np.ndarray:
    """int32 [rows, words] -> signed codes [rows, columns]: a dense stream of bits, least significant first."""
    bits = np.unpackbits(np.ascontiguousarray(packed).view(np.uint8), axis=1, bitorder="little")
    bits = bits[:, : columns * num_bits].reshape(packed.shape[0], columns, num_bits).astype(np.int64)
    return (bits << np.arange(num_bits)).sum(-1) - 2 ** (num_bits - 1)


def codes_of(tensors: dict[str, torch.Tensor], name: str, spec: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [rows, columns], scale and zero point [rows, groups] of one linear."""
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    scale = tensors[f"{name}.weight_scale"].float().numpy()
    codes = unpack(tensors[f"{name}.weight_packed"].numpy(), spec["num_bits"], columns)
    assert codes.shape == (rows, columns)
    zero_point = np.zeros_like(scale)
    if not spec["symmetric"]:
        packed = tensors[f"{name}.weight_zero_point"].numpy()
        zero_point = unpack(packed.T, spec["num_bits"], scale.shape[0]).T.astype(np.float32)
    return codes, scale, zero_point


def factors(tensors: dict[str, torch.Tensor], name: str) -> list[torch.Tensor]:
    """lora_A and lora_B of one linear, float32: int8 codes have a scale for each rank."""
    return [tensors[f"{name}.{factor}"].float() * tensors.get(f"{name}.{factor}_scale", 1)
            for factor in ("lora_A", "lora_B")]


def dequantize(tensors: dict[str, torch.Tensor], name: str, spec: dict) -> np.ndarray:
    codes, scale, zero_point = codes_of(tensors, name, spec)
    grouped = codes.reshape(codes.shape[0] if scale.shape[0] > 1 else 1, scale.shape[1], -1)
    weight = ((grouped - zero_point[..., None]) * scale[..., None]).reshape(codes.shape).astype(np.float32)
    if f"{name}.lora_A" in tensors:
        down, up = factors(tensors, name)
        weight += (up @ down).numpy()
    return weight
