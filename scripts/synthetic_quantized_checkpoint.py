#!/usr/bin/env python3
"""A native quantized checkpoint of the size of a real model, to measure the memory of `baseq export` and `eval`:

    python scripts/synthetic_quantized_checkpoint.py OUT [--layers 32] [--hidden 4096] [--ffn 11008] [--heads 32]
        [--kv-heads 32] [--vocab 32000] [--group-size 64]

Random 4-bit codes with float16 scales, the same in every block; one shard a block. Needs torch and safetensors."""

import argparse
import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file


def format_version() -> int:
    header = Path(__file__).resolve().parents[1] / "include/baseq/model/stored_model.h"
    return int(re.search(r"kFormatVersion = (\d+)", header.read_text()).group(1))


def quantized(name: str, rows: int, columns: int, group_size: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight_packed": torch.randint(-2**31, 2**31 - 1, (rows, columns // 8), dtype=torch.int32),
            f"{name}.weight_scale": (torch.rand(rows, columns // group_size) * 0.02 + 0.001).half(),
            f"{name}.weight_shape": torch.tensor([rows, columns])}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    for name, default in (("layers", 32), ("hidden", 4096), ("ffn", 11008), ("heads", 32), ("kv-heads", 32),
                          ("vocab", 32000), ("group-size", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    a.output.mkdir()
    kv = a.hidden // a.heads * a.kv_heads
    sizes = {"self_attn.q_proj": (a.hidden, a.hidden), "self_attn.k_proj": (kv, a.hidden),
             "self_attn.v_proj": (kv, a.hidden), "self_attn.o_proj": (a.hidden, a.hidden),
             "mlp.gate_proj": (a.ffn, a.hidden), "mlp.up_proj": (a.ffn, a.hidden), "mlp.down_proj": (a.hidden, a.ffn)}
    block = {}
    for name, (rows, columns) in sizes.items():
        block |= quantized(name, rows, columns, a.group_size)
    block |= {f"{norm}.weight": torch.ones(a.hidden) for norm in ("input_layernorm", "post_attention_layernorm")}
    shards = [{"model.embed_tokens.weight": torch.randn(a.vocab, a.hidden).half(),
               "lm_head.weight": torch.randn(a.vocab, a.hidden).half(), "model.norm.weight": torch.ones(a.hidden)}]
    weight_map = {}
    for index in range(a.layers + 1):
        tensors = shards[0] if index == 0 else {f"model.layers.{index - 1}.{name}": t for name, t in block.items()}
        file = f"model-{index + 1:05}-of-{a.layers + 1:05}.safetensors"
        save_file(tensors, a.output / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (a.output / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": a.group_size, "dynamic": False,
               "scale_dtype": "float16"}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
              "hidden_size": a.hidden, "intermediate_size": a.ffn, "num_attention_heads": a.heads,
              "num_key_value_heads": a.kv_heads, "num_hidden_layers": a.layers, "vocab_size": a.vocab,
              "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
              "tie_word_embeddings": False, "torch_dtype": "float16",
              "quantization_config": {"quant_method": "baseq", "format_version": format_version(), "weights": weights,
                                      "input_activations": None, "kv_cache": None, "lora_rank": 0}}
    (a.output / "config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    main()
