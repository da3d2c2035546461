"""The modeling_baseq.py of a native checkpoint, run by transformers, computes what the program computes."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
TINY, BIASED = DATA / "tiny_llama_base", DATA / "tiny_llama_untied_bias"
TRANSFORMS = ("residual", "input", "value", "query_key", "o", "down")


def hadamard(*names: str) -> dict:
    assert set(names) <= set(TRANSFORMS)
    return {name: "hadamard" for name in names}


RECIPES = {
    "weights": {"weights": {"num_bits": 4}},
    "groups of 3 bits": {"weights": {"num_bits": 3, "symmetric": False, "strategy": "group", "group_size": 8,
                                     "scale_dtype": "float16"}},
    "low rank": {"weights": {"num_bits": 3, "strategy": "group", "group_size": 8}, "rounding": {"method": "gptq"},
                 "low_rank": {"rank": 40}, "transforms": hadamard("value", "down")},
    "low rank of 8 bits": {"weights": {"num_bits": 3, "strategy": "group", "group_size": 8},
                           "low_rank": {"rank": 5, "dtype": "int8"}},
    "one scale": {"weights": {"num_bits": 5, "symmetric": False, "strategy": "tensor"}},
    "transforms": {"transforms": hadamard("input", "value", "query_key", "o", "down")},
    "symmetric": {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8, "symmetric": True},
                  "kv_cache": {"num_bits": 3, "symmetric": True}},
    "everything": {
        "weights": {"num_bits": 4}, "rounding": {"method": "gptq"},
        "input_activations": {"num_bits": 4, "clip": 0.9, "shift": "mean", "norm_shift": "mean"},
        "kv_cache": {"num_bits": 4, "clip": 0.95, "shift": "mean"},
        "transforms": hadamard("residual", "value", "query_key", "o", "down") | {"scale_value": True},
        "learn_activations": {"epochs": 1}},
    "online": {
        "weights": {"num_bits": 4, "symmetric": False, "scale_dtype": "bfloat16"},
        "input_activations": {"num_bits": 4, "norm_shift": "mean"}, "kv_cache": {"num_bits": 4, "shift": "mean"},
        "transforms": hadamard("input", "value", "query_key", "o", "down")},
}


@pytest.fixture(scope="session")
def quantized(run, tmp_path_factory):
    """quantized(recipe, model) -> folder of the native checkpoint."""

    def call(recipe: dict, model: Path) -> Path:
        folder = tmp_path_factory.mktemp("modeling")
        recipe = {"rounding": {"method": "rtn"}, "dtype": "float32"} | recipe
        (folder / "recipe.json").write_text(json.dumps(recipe | {"calibration": {"num_samples": 4, "seq_len": 32}}))
        save_file({"input_ids": ids_of(model, (4, 32))}, folder / "ids.safetensors")
        done = run("quantize", model, "--recipe", folder / "recipe.json", "--calibration", folder / "ids.safetensors",
                   "--output", folder / "native", "--quiet")
        assert done.returncode == 0, done.stderr
        return folder / "native"

    return call


def ids_of(model: Path, windows: tuple[int, int]) -> torch.Tensor:
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    return torch.randint(vocab_size, windows, generator=torch.Generator().manual_seed(1), dtype=torch.int32)


@pytest.fixture(scope="session")
def logits_of(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("logits")

    def call(model: Path) -> tuple[torch.Tensor, torch.Tensor]:
        save_file({"input_ids": ids_of(model, (8, 33))}, folder / "ids.safetensors")
        done = run("eval", model, "--tokens", folder / "ids.safetensors", "--seq-len", 33, "--logits",
                   folder / "logits.safetensors", "--quiet")
        assert done.returncode == 0, done.stderr
        tensors = load_file(folder / "logits.safetensors")
        return tensors["input_ids"].long(), tensors["logits"]

    return call


def load(folder: Path, dtype=torch.float32, **options):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=dtype, output_loading_info=True, **options)
    assert type(model).__name__ == "BaseqForCausalLM"
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("model", [TINY, BIASED], ids=["tied", "untied-bias"])
@pytest.mark.parametrize("name", RECIPES)
def test_logits_are_those_of_the_program(quantized, logits_of, name, model):
    folder = quantized(RECIPES[name], model)
    ids, expected = logits_of(folder)
    with torch.no_grad():
        got = load(folder)(ids).logits
    agree = [relative_error(*window) < 1e-5 for window in zip(got, expected)]
    # A value in the middle between two codes falls either way when a sum is formed in another order, and the rest of
    # its window sees the other code: of the windows with quantized activations some may differ.
    assert sum(agree) >= (6 if "input_activations" in RECIPES[name] else 8)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generation_with_a_cache_is_generation_without(quantized, attention):
    model = load(quantized(RECIPES["everything"], TINY), attn_implementation=attention)
    prompt = torch.tensor([[5, 17, 99, 3, 64]])
    with_cache, without = (model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=use_cache,
                                          pad_token_id=0) for use_cache in (True, False))
    assert with_cache.shape == (1, 17)
    assert torch.equal(with_cache, without)


def test_padding_on_the_left_changes_nothing(quantized):
    model = load(quantized(RECIPES["online"], TINY))
    ids = torch.tensor([[5, 17, 99, 3, 64]])
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = torch.tensor([[0] * 4 + [1] * 5])
    with torch.no_grad():
        got = model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits[:, 4:]
        assert relative_error(got, model(ids).logits) < 1e-3


def test_half_precision_keeps_the_scales(quantized, logits_of):
    folder = quantized(RECIPES["weights"], BIASED)
    model = load(folder, dtype=torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.float32
    ids, expected = logits_of(folder)
    with torch.no_grad():
        assert relative_error(model(ids).logits, expected) < 5e-2


def test_sharded_checkpoint_is_read(quantized):
    folder = quantized(RECIPES["everything"], TINY)
    ids = ids_of(TINY, (3, 33)).long()
    with torch.no_grad():
        expected = load(folder)(ids).logits
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with torch.no_grad():
        assert torch.equal(load(folder)(ids).logits, expected)


@pytest.mark.parametrize("hidden, heads, intermediate", [
    (36, 3, 92),    # Paley II over GF(17), 12 from Paley I, Williamson
    (100, 5, 28),   # Paley II over GF(49), 5 * 20 in blocks, Paley I over GF(27)
    (42, 7, 116),   # blocks of 2; 28; Williamson
    (144, 9, 172),  # a product of two 12s; 4 * 36; Williamson
], ids=str)
def test_hadamard_matrices_are_those_of_the_program(quantized, logits_of, tmp_path, hidden, heads, intermediate):
    config = transformers.LlamaConfig(
        hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=heads, head_dim=4,
        intermediate_size=intermediate, num_hidden_layers=1, vocab_size=32, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"])
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    folder = quantized({"transforms": hadamard("input", "query_key", "o", "down")}, tmp_path / "model")
    ids, expected = logits_of(folder)
    with torch.no_grad():
        assert relative_error(load(folder)(ids).logits, expected) < 1e-5


def test_another_format_version_is_refused(quantized):
    folder = quantized(RECIPES["weights"], TINY)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format_version 99"):
        load(folder)


def test_exports_leave_it_out(quantized, run, tmp_path):
    folder = quantized(RECIPES["weights"], TINY)
    assert (folder / "modeling_baseq.py").is_file()
    assert run("export", folder, "--format", "hf", "--output", tmp_path / "out", "--quiet").returncode == 0
    assert not (tmp_path / "out" / "modeling_baseq.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
