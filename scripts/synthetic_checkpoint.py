#!/usr/bin/env python3
"""Make a Hugging Face checkpoint of any shape with random bfloat16 weights, to measure time and memory with.

    python scripts/synthetic_checkpoint.py runs/synthetic-7b
    python scripts/synthetic_checkpoint.py runs/narrow --hidden 256 --intermediate 768 --heads 4 --layers 32

The defaults are the shape of Llama-2-7B, 13.5 GB. One shard a block is written at a time, so the size does not matter to
the memory of this script. It needs numpy. The model says nothing of use; its tokenizer is that of --tokenizer.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
# Small enough that a residual stream of many blocks stays finite in float16.
DEVIATION = 0.02


def shapes_of_block(args: argparse.Namespace, index: int) -> dict[str, tuple[int, ...]]:
    prefix, kv = f"model.layers.{index}.", args.kv_heads * (args.hidden // args.heads)
    return {
        prefix + "input_layernorm.weight": (args.hidden,),
        prefix + "mlp.down_proj.weight": (args.hidden, args.intermediate),
        prefix + "mlp.gate_proj.weight": (args.intermediate, args.hidden),
        prefix + "mlp.up_proj.weight": (args.intermediate, args.hidden),
        prefix + "post_attention_layernorm.weight": (args.hidden,),
        prefix + "self_attn.k_proj.weight": (kv, args.hidden),
        prefix + "self_attn.o_proj.weight": (args.hidden, args.hidden),
        prefix + "self_attn.q_proj.weight": (args.hidden, args.hidden),
        prefix + "self_attn.v_proj.weight": (kv, args.hidden),
    }


def random_bfloat16(shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    if len(shape) == 1:  # a norm
        values = np.ones(shape, np.float32)
    else:
        values = generator.standard_normal(shape, dtype=np.float32) * np.float32(DEVIATION)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], generator: np.random.Generator) -> int:
    """A safetensors file, tensor by tensor; returns the bytes of its tensors."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            file.write(random_bfloat16(shape, generator).tobytes())
    return end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "tests" / "data" / "tokenizer" / "tokenizer.json")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.kv_heads = args.kv_heads or args.heads
    if args.hidden % args.heads or args.heads % args.kv_heads:
        sys.exit("synthetic_checkpoint: heads must divide hidden, and kv-heads heads")
    args.output.mkdir(parents=True)

    shards = [{"model.embed_tokens.weight": (args.vocab, args.hidden)}]
    shards += [shapes_of_block(args, index) for index in range(args.layers)]
    shards += [{"lm_head.weight": (args.vocab, args.hidden), "model.norm.weight": (args.hidden,)}]
    weight_map, total = {}, 0
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        total += write_shard(args.output / name, shapes, np.random.default_rng([args.seed, number]))
        weight_map |= dict.fromkeys(shapes, name)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": args.hidden,
              "intermediate_size": args.intermediate, "num_hidden_layers": args.layers,
              "num_attention_heads": args.heads, "num_key_value_heads": args.kv_heads, "vocab_size": args.vocab,
              "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
              "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (args.output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (args.output / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer = args.tokenizer / "tokenizer.json" if args.tokenizer.is_dir() else args.tokenizer
    shutil.copy(tokenizer, args.output / "tokenizer.json")
    print(f"{args.output}: {total / 1e9:.2f} GB in {len(shards)} shards")


if __name__ == "__main__":
    main()
