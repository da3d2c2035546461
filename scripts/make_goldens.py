#!/usr/bin/env python3
"""Write the tiny checkpoints of tests/data and what transformers computes with them.

    python scripts/make_goldens.py [VARIANT ...]

Each tests/data/tiny_<variant>/ holds config.json, the weights and golden.safetensors:
    input_ids      int64   [2, length]
    layers.<i>     float32 [2, length, hidden]  output of decoder layer i, before the final norm
    logits         float32 [2, length, vocab]
    short_logits   float32 [2, 20, vocab]       of the first tokens alone: some rotary embeddings ask for the length
layers.<i> only of the first four, short_logits only of the others. All arithmetic is float32, also where the weights are stored in bfloat16. Needs tests/requirements.txt and torch. The
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
BATCH, LENGTH, SHORT_LENGTH = 2, 24, 20

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
WITH_LAYERS = {
    "llama_base": BASE,
    "llama_untied_bias": {
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
    "llama_mha_headdim": {  # the heads together are wider than the residual stream
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
    "llama_sharded": BASE,  # stored in bfloat16, in several files
}

# The rest: an architecture or an option each, stored in bfloat16.
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
WIDE_HEADS = SMALL | {"head_dim": 16}


def scaled(rope_type: str, **fields) -> dict:
    """A Llama whose heads are wide enough for every branch of a rope scaling."""
    return WIDE_HEADS | {"rope_scaling": {"rope_type": rope_type} | fields}


WITHOUT_LAYERS = {
    "llama_linear": ("llama", 48, scaled("linear", factor=2.5) | {"max_position_embeddings": 32}),
    "llama_dynamic": ("llama", 48, scaled("dynamic", factor=4.0) | {"max_position_embeddings": 32}),
    "llama_llama3": (  # of the eight wavelengths some are kept, some interpolated, some stretched
        "llama",
        96,
        scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
        | {"max_position_embeddings": 512},
    ),
    "llama_yarn": (
        "llama",
        48,
        scaled("yarn", factor=4.0, original_max_position_embeddings=32) | {"max_position_embeddings": 128},
    ),
    "llama_yarn_options": (
        "llama",
        48,
        scaled("yarn", factor=8.0, beta_fast=4.0, beta_slow=0.25, mscale=0.7, mscale_all_dim=1.3, truncate=False)
        | {"max_position_embeddings": 32},
    ),
    "mistral": ("mistral", LENGTH, WIDE_HEADS | {"sliding_window": 7}),
    "qwen2": ("qwen2", LENGTH, SMALL | {"tie_word_embeddings": True}),
    "qwen2_window": (
        "qwen2",
        LENGTH,
        SMALL | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", LENGTH, WIDE_HEADS | {"tie_word_embeddings": True}),
    "qwen3_options": (
        "qwen3",
        48,
        scaled("yarn", factor=2.0, attention_factor=0.8, original_max_position_embeddings=16)
        | {
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("phi3", LENGTH, SMALL | {"sliding_window": 11}),
    "phi3_longrope": (  # eight of sixteen features turn
        "phi3",
        48,
        SMALL
        | {
            "num_attention_heads": 2,
            "partial_rotary_factor": 0.5,
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 32,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.1, 1.25, 1.5],
                "long_factor": [1.0, 2.0, 3.5, 5.0],
            },
        },
    ),
    "smollm3": (
        "smollm3",
        LENGTH,
        SMALL | {"num_hidden_layers": 3, "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 9},
    ),
    "granite": (
        "granite",
        LENGTH,
        SMALL
        | {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.25,
            "logits_scaling": 6.0,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
}
VARIANTS = [*WITH_LAYERS, *WITHOUT_LAYERS]


@torch.no_grad()
def randomize(model: transformers.PreTrainedModel, generator: torch.Generator) -> None:
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
def run(model: transformers.PreTrainedModel, input_ids: torch.Tensor, with_layers: bool) -> dict[str, torch.Tensor]:
    if not with_layers:  # the short ones first: a dynamic rotary embedding remembers the longest
        short = model(input_ids[:, :SHORT_LENGTH], use_cache=False).logits
        return {"input_ids": input_ids, "short_logits": short, "logits": model(input_ids, use_cache=False).logits}
    outputs = {"input_ids": input_ids}
    for index, layer in enumerate(model.model.layers):

        def record(_module, _inputs, output, name=f"layers.{index}"):
            outputs[name] = (output[0] if isinstance(output, tuple) else output).clone()

        layer.register_forward_hook(record)
    outputs["logits"] = model(input_ids, use_cache=False).logits
    return outputs


def write_variant(name: str) -> None:
    generator = torch.Generator().manual_seed(SEED)
    with_layers = name in WITH_LAYERS
    family, length, fields = ("llama", LENGTH, WITH_LAYERS[name]) if with_layers else WITHOUT_LAYERS[name]
    config = transformers.AutoConfig.for_model(family, **COMMON | fields)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    randomize(model, generator)
    input_ids = torch.randint(config.vocab_size, (BATCH, length), generator=generator)

    folder = DATA / f"tiny_{name}"
    shutil.rmtree(folder, ignore_errors=True)
    if name == "llama_sharded":
        model.bfloat16().save_pretrained(folder, max_shard_size="48KB")
    else:
        (model if with_layers else model.bfloat16()).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)

    # Read back, so that only the weights were ever rounded and not, say, the rotary frequencies.
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    outputs = run(model.eval(), input_ids, with_layers)
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
