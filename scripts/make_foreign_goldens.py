#!/usr/bin/env python3
"""Write tests/data/foreign: linears as other tools store them, and the weights that they stand for.

    python scripts/make_foreign_goldens.py

compressed_tensors.safetensors  every packing, by the compressed-tensors package; that of versions before 0.18 by NumPy
gptq.safetensors                GPTQ of versions 1 and 2 and AWQ, by NumPy from the published layouts
types.gguf                      a model of one block with a tensor of every type, by the gguf package
types.safetensors               its weights as that package reads them back, under Hugging Face's names

A case of the first two is one linear "<case>" with the tensors of its format, `<case>.expected` float32 [out_features,
in_features], and in the metadata its `quantization_config` as JSON. Needs tests/requirements.txt and torch.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data" / "foreign"
ROWS, COLUMNS, GROUP = 16, 64, 32
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


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


def padded(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Dense words as versions before 0.18 packed them: no code lies in two words."""
    per_word = 32 // bits
    codes = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : columns * bits]
    codes = np.pad(codes.reshape(len(words), columns, bits), ((0, 0), (0, -columns % per_word), (0, 0)))
    stream = codes.reshape(len(words), -1, per_word * bits)
    stream = np.pad(stream, ((0, 0), (0, 0), (0, 32 - per_word * bits)))
    return np.packbits(stream.reshape(len(words), -1), axis=1, bitorder="little").view(np.int32)


def compressed_tensors(weight: torch.Tensor) -> tuple[dict, dict]:
    import compressed_tensors.compressors as compressors
    from compressed_tensors.quantization import QuantizationConfig

    by_format = {"pack-quantized": compressors.PackedQuantizationCompressor,
                 "int-quantized": compressors.IntQuantizationCompressor,
                 "naive-quantized": compressors.NaiveQuantizationCompressor}
    cases = {f"w{bits}-channel": ("pack-quantized", {"num_bits": bits, "strategy": "channel"}) for bits in range(2, 9)}
    cases |= {f"w{bits}-group": ("pack-quantized", {"num_bits": bits, "strategy": "group", "group_size": GROUP})
              for bits in (3, 4, 8)}
    cases |= {f"w{bits}-zero-points": ("pack-quantized", {"num_bits": bits, "strategy": "group", "group_size": GROUP,
                                                          "symmetric": False}) for bits in (4, 8)}
    cases |= {"w8-tensor": ("pack-quantized", {"num_bits": 8, "strategy": "tensor"}),
              "int-w8-channel": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
              "int-w8-zero-points": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
              "naive-w4-group": ("naive-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP})}
    tensors, metadata = {}, {}
    for name, (form, weights) in cases.items():
        group = {"targets": ["Linear"], "format": form, "weights": {"type": "int"} | weights}
        config = QuantizationConfig.model_validate({"config_groups": {"group_0": group}, "format": form,
                                                    "quantization_status": "compressed"})
        scheme = config.config_groups["group_0"]
        dtype = torch.bfloat16 if "group" in name else torch.float32
        parts = {"weight": weight.clone()} | observed(weight, scheme.weights, dtype)
        stored = {key: value for key, value in by_format[form].compress(parts, scheme).items()}
        quantization = json.loads(config.model_dump_json()) | {"version": "0.20.0"}
        in_float32 = stored | {"weight_scale": stored["weight_scale"].float()}  # computes in the dtype of the scales
        expected = by_format[form].decompress(in_float32, scheme)["weight"]
        for version in ("", "padded-"):
            bits = weights["num_bits"]
            if version and (form != "pack-quantized" or 32 % bits == 0):
                continue
            if version:
                stored["weight_packed"] = torch.from_numpy(padded(stored["weight_packed"].numpy(), bits, COLUMNS))
                quantization["version"] = "0.17.1"
            case = version + name
            tensors |= {f"{case}.{key}": value.contiguous().clone() for key, value in stored.items()}
            tensors[f"{case}.expected"] = expected.clone()
            metadata[case] = json.dumps(quantization, sort_keys=True)
    return tensors, metadata


def pack_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [rows, columns] -> words [rows * bits / 32, columns]: a stream of bits down every column."""
    stream = (codes.T[..., None] >> np.arange(bits)) & 1
    return np.packbits(stream.reshape(codes.shape[1], -1).astype(np.uint8), axis=1, bitorder="little").view(np.int32).T


def pack_awq(codes: np.ndarray) -> np.ndarray:
    """[rows, columns] -> [rows, columns / 8]."""
    grouped = codes.reshape(codes.shape[0], -1, 8)[..., AWQ_ORDER].astype(np.uint32)
    return (grouped << (4 * np.arange(8, dtype=np.uint32))).sum(-1, dtype=np.uint32).view(np.int32)


def gptq(random: np.random.Generator) -> tuple[dict, dict]:
    tensors, metadata = {}, {}
    cases = [(f"{form}-w{bits}{'-order' if order else ''}", form, bits, order)
             for form in ("gptq", "gptq_v2") for bits in (2, 3, 4, 8) for order in (False, True)]
    rows = 32  # 3 bits: whole words of zero points
    for case, form, bits, order in [*cases, ("awq-w4", "awq", 4, False)]:
        codes = random.integers(0, 2**bits, (COLUMNS, rows))
        zeros = random.integers(1, 2**bits, (COLUMNS // GROUP, rows))  # version 1 has no word for 0
        scales = (0.02 * random.random(zeros.shape) + 0.005).astype(np.float16)
        index = np.arange(COLUMNS) // GROUP
        if order:
            index = random.permutation(index)
        weight = (codes - zeros[index]).astype(np.float32) * scales[index].astype(np.float32)
        if form == "awq":
            stored = {"qweight": pack_awq(codes), "qzeros": pack_awq(zeros), "scales": scales}
        else:
            less = 1 if form == "gptq" else 0
            stored = {"qweight": pack_rows(codes, bits), "qzeros": pack_rows((zeros - less).T, bits).T,
                      "scales": scales, "g_idx": index.astype(np.int32)}
        stored["expected"] = weight.T
        tensors |= {f"{case}.{key}": torch.from_numpy(np.ascontiguousarray(array)) for key, array in stored.items()}
        config = {"quant_method": "awq" if form == "awq" else "gptq", "bits": bits, "group_size": GROUP}
        metadata[case] = json.dumps(config if form == "awq" else config | {"checkpoint_format": form, "desc_act": order})
    return tensors, metadata


def gguf_file(random: np.random.Generator, path: Path) -> dict:
    import gguf

    types = gguf.GGMLQuantizationType
    vocabulary, hidden, ffn, heads, kv_heads, head_dim = 8, 256, 32, 4, 2, 8
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    linears = {  # name, type, shape, heads whose rows llama.cpp stores in another order
        "self_attn.q_proj": ("attn_q", types.Q4_0, (heads * head_dim, hidden), heads),
        "self_attn.k_proj": ("attn_k", types.Q4_1, (kv_heads * head_dim, hidden), kv_heads),
        "self_attn.v_proj": ("attn_v", types.Q6_K, (kv_heads * head_dim, hidden), 0),
        "self_attn.o_proj": ("attn_output", types.Q8_0, (hidden, heads * head_dim), 0),
        "mlp.gate_proj": ("ffn_gate", types.BF16, (ffn, hidden), 0),
        "mlp.up_proj": ("ffn_up", types.F16, (ffn, hidden), 0),
        "mlp.down_proj": ("ffn_down", types.F32, (hidden, ffn), 0)}
    expected = {}

    def add(theirs: str, ours: str, kind, shape: tuple, rows_of: int = 0) -> None:
        values = random.standard_normal(shape).astype(np.float32) / 16
        if kind == types.Q6_K:  # the package reads this type and does not write it
            blocks = random.integers(0, 256, (shape[0], shape[1] // 256 * 210), dtype=np.uint8)
            for block in range(shape[1] // 256):
                scale = random.random((shape[0], 1)).astype(np.float16) / 512
                blocks[:, block * 210 + 208 : block * 210 + 210] = scale.view(np.uint8)
        else:
            blocks = gguf.quants.quantize(values, kind)
        writer.add_tensor(theirs, blocks, raw_dtype=kind)
        values = gguf.quants.dequantize(blocks, kind).reshape(shape).astype(np.float32)
        if rows_of:
            values = values.reshape(rows_of, shape[0] // rows_of // 2, 2, -1).swapaxes(1, 2).reshape(shape)
        expected[ours] = torch.from_numpy(np.ascontiguousarray(values))

    add("token_embd.weight", "model.embed_tokens.weight", types.F32, (vocabulary, hidden))
    add("output_norm.weight", "model.norm.weight", types.F32, (hidden,))
    for theirs, ours in (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
        add(f"blk.0.{theirs}.weight", f"model.layers.0.{ours}.weight", types.F32, (hidden,))
    for ours, (theirs, kind, shape, rows_of) in linears.items():
        add(f"blk.0.{theirs}.weight", f"model.layers.0.{ours}.weight", kind, shape, rows_of)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    return expected


def main() -> None:
    DATA.mkdir(parents=True, exist_ok=True)
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(7)) / 8
    tensors, metadata = compressed_tensors(weight.bfloat16().float())
    save_file(tensors, DATA / "compressed_tensors.safetensors", metadata)
    tensors, metadata = gptq(np.random.default_rng(7))
    save_file(tensors, DATA / "gptq.safetensors", metadata)
    save_file(gguf_file(np.random.default_rng(7), DATA / "types.gguf"), DATA / "types.safetensors")
    for file in sorted(DATA.iterdir()):
        print(f"{file.relative_to(ROOT)}: {file.stat().st_size} bytes")


if __name__ == "__main__":
    sys.exit(main())
