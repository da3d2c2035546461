#!/usr/bin/env python3
"""Write the tiny Llama checkpoints of tests/data and what transformers computes with them.

    python scripts/make_goldens.py [VARIANT ...]

Each tests/data/tiny_llama_<variant>/ holds config.json, the weights and golden.safetensors:
    input_ids   int64   [2, 24]
    layers.<i>  float32 [2, 24, hidden]   output of decoder layer i, before the final norm
    logits      float32 [2, 24, vocab]
All arithmetic is float32, also where the weights are stored in bfloat16. Needs tests/requirements.txt and torch. The
weights and ids depend on the seed only; logits may differ in their last bits between processors.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

DATA = Path(__file__).resolve().parent.parent / "tests" / "data"
SEED = 42
BATCH, LENGTH = 2, 24

COMMON = {
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,  # 12 * 8: a Hadamard matrix that is no power of two
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
VARIANTS = {
    "base": BASE,
    "untied_bias": {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 100000.0,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mha_headdim": {  # the heads together are wider than the residual stream
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 96,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    },
    "sharded": BASE,  # stored in bfloat16, in several files
}


@torch.no_grad()
def randomize(model: transformers.LlamaForCausalLM, generator: torch.Generator) -> None:
    """Weights that keep activations and logits of order one, and no norm or bias at its default."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            parameter.copy_(1 + 0.2 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.2 * noise)
        else:  # linear layers and the embedding, which is the output layer too when tied
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)


@torch.no_grad()
def run(model: transformers.LlamaForCausalLM, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    outputs = {"input_ids": input_ids}
    for index, layer in enumerate(model.model.layers):

        def record(_module, _inputs, output, name=f"layers.{index}"):
            outputs[name] = (output[0] if isinstance(output, tuple) else output).clone()

        layer.register_forward_hook(record)
    outputs["logits"] = model(input_ids, use_cache=False).logits
    return outputs


def write_variant(name: str) -> None:
    generator = torch.Generator().manual_seed(SEED)
    config = transformers.LlamaConfig(**COMMON, **VARIANTS[name])
    model = transformers.LlamaForCausalLM(config).float()
    randomize(model, generator)
    input_ids = torch.randint(config.vocab_size, (BATCH, LENGTH), generator=generator)

    folder = DATA / f"tiny_llama_{name}"
    shutil.rmtree(folder, ignore_errors=True)
    if name == "sharded":
        model.bfloat16().save_pretrained(folder, max_shard_size="48KB")
    else:
        model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)

    # Read back, so that only the weights were ever rounded and not, say, the rotary frequencies.
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    outputs = run(model.eval(), input_ids)
    made_by = {
        "command": f"python scripts/make_goldens.py {name}",
        "seed": SEED,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    # One entry: safetensors writes several in an order that changes from run to run.
    save_file(outputs, folder / "golden.safetensors", metadata={"made_by": json.dumps(made_by)})
    size = sum(file.stat().st_size for file in folder.iterdir())
    logits = outputs["logits"]
    print(f"{folder.name}: {size / 1e3:.0f} kB, logits {logits.mean():.3f} +- {logits.std():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"some of: {', '.join(VARIANTS)} (default: all)")
    arguments = parser.parse_args()
    if unknown := set(arguments.variants) - set(VARIANTS):
        parser.error(f"unknown variant {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    torch.set_num_threads(1)
    for name in arguments.variants or VARIANTS:
        write_variant(name)


if __name__ == "__main__":
    main()
