"""`baseq export --format gguf`, read with the gguf package, the loader of transformers and llama.cpp."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tiny_runs import POINTS, ROUND, hadamard, recipe_of

ROOT = Path(__file__).resolve().parents[2]
HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4, 2, 16, 640
NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down"}
ROTATED = hadamard("residual", "value")
WEIGHTS = {
    "F16": {"num_bits": 3, "symmetric": False, "strategy": "group", "group_size": 8},
    "Q8_0": {"num_bits": 8, "strategy": "channel", "scale_dtype": "float16"},
    "Q4_0": {"num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": "float16"},
    "Q4_1": {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 32, "scale_dtype": "float16"},
}


@pytest.fixture(scope="session", params=[False, True], ids=["plain", "bias"])
def model(request, tmp_path_factory) -> Path:
    """A random model with the tokenizer of the tests, whose vocabulary leaves some ids of the model without a token."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM, num_hidden_layers=2, vocab_size=VOCAB, max_position_embeddings=256, rope_theta=5000.0,
        bos_token_id=1, eos_token_id=[2, 0], attention_bias=request.param, mlp_bias=request.param,
        tie_word_embeddings=False, architectures=["LlamaForCausalLM"])
    network = transformers.LlamaForCausalLM(config)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    network.half().float().save_pretrained(folder)
    shutil.copy(ROOT / "tests" / "data" / "tokenizer" / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}", "add_bos_token": false}')
    return folder


@pytest.fixture(scope="session")
def exported(run, model, tmp_path_factory):
    """exported(type) -> native folder, hf folder (float32) and GGUF file of the same weights."""
    made = {}

    def call(name: str) -> tuple[Path, Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp("gguf")
            steps = [ROTATED, *([ROUND] if WEIGHTS[name] else [])]
            (folder / "recipe.json").write_text(json.dumps(recipe_of(*steps, weights=WEIGHTS[name], dtype="float16")))
            for command in (("quantize", model, "--recipe", folder / "recipe.json", "--output", folder / "native"),
                            ("export", folder / "native", "--format", "hf", "--dtype", "float32", "--output",
                             folder / "hf"),
                            ("export", folder / "native", "--format", "gguf", "--gguf-type", name, "--gguf-head-type",
                             "F16", "--output", folder / "model.gguf")):
                done = run(*command, "--quiet")
                assert done.returncode == 0, done.stderr
            made[name] = folder / "native", folder / "hf", folder / "model.gguf"
        return made[name]

    return call


def permuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """As convert_hf_to_gguf.py turns rows of q and k."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_gguf_package_reads_the_weights(exported, name):
    _, hf, file = exported(name)
    expected = load_file(hf / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert len(tensors) == len(expected)

    def value(key: str) -> torch.Tensor:
        tensor = tensors[key]
        return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))

    for key, source in (("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")):
        assert torch.equal(value(f"{key}.weight"), expected[f"{source}.weight"]), key
    for block in range(2):
        for linear, short in NAMES.items():
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(short)
            for part in ("weight", "bias"):
                source = expected.get(f"model.layers.{block}.{linear}.{part}")
                if source is None:
                    continue
                source = permuted(source, heads) if heads else source
                got = value(f"blk.{block}.{short}.{part}")
                if part == "bias" or name in ("Q8_0", "Q4_0"):
                    assert torch.equal(got, source), (linear, part)
                elif name == "F16":
                    assert torch.equal(got, source.half().float()), linear
                else:  # the minimum of a block is rounded to float16
                    assert ((got - source).abs() <= source.abs().max() * 2**-10).all(), linear
            if (block, linear) == (0, "mlp.up_proj"):
                assert tensors[f"blk.0.{short}.weight"].tensor_type.name == name


@pytest.mark.parametrize("name", WEIGHTS)
def test_embedding_and_head_have_eight_bits_beside_quantized_linears(exported, run, tmp_path, name):
    native, hf, plain = exported(name)
    done = run("export", native, "--format", "gguf", "--gguf-type", name, "--output", tmp_path / "model.gguf", "--quiet")
    assert done.returncode == 0, done.stderr
    expected = load_file(hf / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    for key, source in (("token_embd", "model.embed_tokens"), ("output", "lm_head")):
        tensor = tensors[f"{key}.weight"]
        assert tensor.tensor_type.name == ("F16" if name == "F16" else "Q8_0")
        got = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        blocks = expected[f"{source}.weight"].unflatten(1, (-1, 32))
        # Half a step, and what rounding the scale to float16 moves the largest value by.
        largest = blocks.abs().amax(-1, keepdim=True)
        assert ((got.unflatten(1, (-1, 32)) - blocks).abs() <= largest / 127.5 * 0.57).all(), key
    same = {tensor.name: tensor for tensor in gguf.GGUFReader(plain).tensors}
    assert all(np.array_equal(tensors[key].data, same[key].data) for key in tensors if key.startswith("blk."))


@pytest.mark.parametrize("name", WEIGHTS)
def test_transformers_computes_the_logits_of_the_native_checkpoint(exported, run, tmp_path, name):
    native, _, file = exported(name)
    if "attention_bias" in (config := json.loads((native / "config.json").read_text())) and config["attention_bias"]:
        pytest.skip("the GGUF loader of transformers has no names for the biases of a Llama")
    ids = torch.randint(VOCAB, (3, 33), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    done = run("eval", native, "--tokens", tmp_path / "ids.safetensors", "--seq-len", 33, "--logits",
               tmp_path / "logits.safetensors", "--arithmetic", "float", "--quiet")
    assert done.returncode == 0, done.stderr
    expected = load_file(tmp_path / "logits.safetensors")["logits"].double()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        got = loaded.eval()(ids.long()).logits.double()
    assert float((got - expected).norm() / expected.norm()) < (1e-5 if name in ("Q8_0", "Q4_0") else 2e-3)


def llama_cpp_error(run, native: Path, file: Path, folder: Path) -> float:
    """Relative error of llama.cpp's logits of the file against the program's of the native checkpoint."""
    llama = pytest.importorskip("cyllama.llama.llama_cpp", reason="cyllama, which brings llama.cpp, is not installed; "
                                "pip install -r tests/requirements.txt")
    ids = torch.randint(VOCAB, (1, 48), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    save_file({"input_ids": ids}, folder / "ids.safetensors")
    done = run("eval", native, "--tokens", folder / "ids.safetensors", "--seq-len", 48, "--logits",
               folder / "logits.safetensors", "--arithmetic", "float", "--quiet")
    assert done.returncode == 0, done.stderr
    expected = load_file(folder / "logits.safetensors")["logits"][0].double()
    model = type("Model", (llama.LlamaModel,), {"n_vocab": VOCAB})(str(file), llama.LlamaModelParams(), False)
    parameters = llama.LlamaContextParams()
    parameters.n_ctx = 64
    context = llama.LlamaContext(model, parameters, False)
    batch = llama.LlamaBatch(n_tokens=48, embd=0, n_seq_max=1)
    batch.set_batch(ids[0].tolist(), 0, True)
    context.decode(batch)
    got = torch.tensor([list(context.get_logits_ith(i)) for i in range(48)]).double()
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", WEIGHTS)
def test_llama_cpp_computes_the_logits_of_the_native_checkpoint(exported, run, tmp_path, name):
    native, _, file = exported(name)
    # Products of quantized blocks round the activations to 8 bits.
    assert llama_cpp_error(run, native, file, tmp_path) < (2e-3 if name == "F16" else 1e-2)


def test_embedding_and_head_have_8_bits_unless_told_otherwise(exported, run, tmp_path):
    native, hf, _ = exported("Q4_0")
    file = tmp_path / "out.gguf"
    done = run("export", native, "--format", "gguf", "--output", file)
    assert done.returncode == 0 and "Embedding and head are Q8_0" in done.stdout, done.stderr
    expected = load_file(hf / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for key, source in (("token_embd.weight", "model.embed_tokens.weight"), ("output.weight", "lm_head.weight")):
        assert tensors[key].tensor_type.name == "Q8_0"
        got = torch.from_numpy(gguf.quants.dequantize(tensors[key].data, tensors[key].tensor_type).astype(np.float32))
        got, values = got.unflatten(-1, (-1, 32)), expected[source].unflatten(-1, (-1, 32))
        # Half a step of 255, and the rounding of its size to float16.
        bound = values.abs().amax(-1, keepdim=True) * (0.5 / 127.5 + 2**-10)
        assert ((got - values).abs() <= bound).all(), key
    assert llama_cpp_error(run, native, file, tmp_path) < 1.5e-2
    refused = run("export", native, "--format", "gguf", "--gguf-head-type", "Q4_0", "--output", file)
    assert refused.returncode == 2 and "Q8_0" in refused.stderr


FAMILIES = {
    "mistral": (transformers.MistralConfig, {"sliding_window": 64}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {}),
    "llama3": (transformers.LlamaConfig, {"rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}}),
    "linear": (transformers.LlamaConfig, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
}


def exported_family(run, tmp_path, family, name) -> str:
    """Writes `native` and `model.gguf`; what the export printed."""
    make, fields = FAMILIES[family]
    torch.manual_seed(0)
    config = make(hidden_size=64, intermediate_size=96, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
                  head_dim=HEAD_DIM, num_hidden_layers=2, vocab_size=VOCAB, max_position_embeddings=256,
                  rope_theta=5000.0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, **fields)
    network = transformers.AutoModelForCausalLM.from_config(config)
    for parameter_name, parameter in network.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    network.half().float().save_pretrained(tmp_path / "model")
    shutil.copy(ROOT / "tests" / "data" / "tokenizer" / "tokenizer.json", tmp_path / "model")
    steps = [ROUND] if WEIGHTS[name] else []
    (tmp_path / "recipe.json").write_text(json.dumps(recipe_of(*steps, weights=WEIGHTS[name], dtype="float16")))
    for command in (("quantize", tmp_path / "model", "--recipe", tmp_path / "recipe.json", "--output",
                     tmp_path / "native"),
                    ("export", tmp_path / "native", "--format", "gguf", "--gguf-type", name, "--gguf-head-type",
                     "F16", "--output", tmp_path / "model.gguf")):
        done = run(*command, "--quiet")
        assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["F16", "Q4_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_the_logits_of_other_families(run, tmp_path, family, name):
    said = exported_family(run, tmp_path, family, name)
    error = llama_cpp_error(run, tmp_path / "native", tmp_path / "model.gguf", tmp_path)
    assert error < (2e-3 if name == "F16" else 1e-2)
    if family == "mistral":
        assert "sliding window" in said


def test_metadata_is_that_of_the_model(exported):
    fields = gguf.GGUFReader(exported("Q4_0")[2]).fields
    value = {key: field.contents() for key, field in fields.items()}
    assert value["general.architecture"] == "llama"
    assert value["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert [value[f"llama.{key}"] for key in (
        "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
        "attention.head_count_kv", "attention.key_length", "rope.dimension_count", "rope.freq_base", "vocab_size")] == [
            256, 64, 2, 96, HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM, 5000.0, VOCAB]
    tokenizer = json.loads((ROOT / "tests" / "data" / "tokenizer" / "tokenizer.json").read_text())
    vocab = {id: token for token, id in tokenizer["model"]["vocab"].items()}
    vocab |= {added["id"]: added["content"] for added in tokenizer["added_tokens"]}
    tokens = value["tokenizer.ggml.tokens"]
    assert tokens == [vocab.get(id, f"[PAD{id}]") for id in range(VOCAB)]
    assert value["tokenizer.ggml.merges"] == [" ".join(merge) for merge in tokenizer["model"]["merges"]]
    types = value["tokenizer.ggml.token_type"]
    special = {added["id"] for added in tokenizer["added_tokens"] if added["special"]}
    assert {id for id, kind in enumerate(types) if kind == gguf.TokenType.CONTROL} == special
    assert {id for id, kind in enumerate(types) if kind == gguf.TokenType.UNUSED} == set(range(VOCAB)) - set(vocab)
    assert value["tokenizer.ggml.model"] == "gpt2"
    assert value["tokenizer.ggml.pre"] == "smollm"
    assert value["tokenizer.ggml.eos_token_id"] == 2
    assert value["tokenizer.ggml.add_bos_token"] is False
    assert value["tokenizer.chat_template"] == "{{ messages }}"


def test_dry_run_lists_types_and_values(exported, run, tmp_path):
    native, _, file = exported("Q4_0")
    done = run("export", native, "--format", "gguf", "--gguf-head-type", "F16", "--dry-run", "--json",
               tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    tensors = gguf.GGUFReader(file).tensors
    assert {tensor["name"]: (tensor["dtype"], tensor["shape"][::-1]) for tensor in plan["tensors"]} == {
        tensor.name: (tensor.tensor_type.name, list(map(int, tensor.shape))) for tensor in tensors}
    assert plan["bytes"] == sum(int(tensor.n_bytes) for tensor in tensors)


@pytest.mark.parametrize("method, named", [
    (recipe_of(ROUND, weights=WEIGHTS["Q4_0"] | {"group_size": 16}), "groups of 16"),
    (recipe_of(ROUND, weights=WEIGHTS["Q4_1"]), "asymmetric weights"),
    (recipe_of(ROUND, weights=WEIGHTS["Q8_0"]), "weights of 8 bits"),
    (recipe_of(ROUND, weights=WEIGHTS["Q4_0"] | {"scale_dtype": "bfloat16"}), "float16"),
    (recipe_of(hadamard("down"), ROUND, weights=WEIGHTS["Q4_0"]), "an online transform of the down_proj input"),
    (recipe_of(POINTS, ROUND, weights=WEIGHTS["Q4_0"], inputs={"num_bits": 8}), "activations"),
    (recipe_of(), "full precision"),
])
def test_what_the_type_cannot_carry_is_refused(run, model, tmp_path, method, named):
    (tmp_path / "recipe.json").write_text(json.dumps(method))
    done = run("quantize", model, "--recipe", tmp_path / "recipe.json", "--output", tmp_path / "native", "--quiet")
    assert done.returncode == 0, done.stderr
    done = run("export", tmp_path / "native", "--format", "gguf", "--output", tmp_path / "out.gguf")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert named in done.stderr and "q4_0-gguf" in done.stderr
    assert not list(tmp_path.glob("out.gguf*"))


def test_tokenizers_that_have_no_name_are_refused(exported, run, tmp_path):
    native = tmp_path / "native"
    shutil.copytree(exported("Q4_0")[0], native)
    tokenizer = json.loads((native / "tokenizer.json").read_text())
    (native / "tokenizer.json").write_text(json.dumps(tokenizer | {"pre_tokenizer": {"type": "Whitespace"}}))
    done = run("export", native, "--format", "gguf", "--output", tmp_path / "out.gguf")
    assert done.returncode == 1 and "Whitespace" in done.stderr
    (native / "tokenizer.json").unlink()
    done = run("export", native, "--format", "gguf", "--output", tmp_path / "out.gguf")
    assert done.returncode == 1 and "tokenizer.json" in done.stderr
