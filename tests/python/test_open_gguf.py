"""GGUF files as MODEL: those of `baseq export` and those that the gguf package writes."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import loaded_logits, relative_error
from test_gguf import FAMILIES, HEADS, KV_HEADS, NAMES, ROOT, VOCAB, exported, exported_family, model, permuted  # noqa: F401

TYPES = {"F32": gguf.GGMLQuantizationType.F32, "F16": gguf.GGMLQuantizationType.F16,
         "BF16": gguf.GGMLQuantizationType.BF16, "Q8_0": gguf.GGMLQuantizationType.Q8_0,
         "Q4_0": gguf.GGMLQuantizationType.Q4_0, "Q4_1": gguf.GGMLQuantizationType.Q4_1}
IDS = torch.randint(VOCAB, (3, 33), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


@pytest.fixture(scope="session")
def logits_of_file(run, tmp_path_factory):
    """logits_of_file(model) -> what the program computes of IDS."""
    folder = tmp_path_factory.mktemp("logits")
    save_file({"input_ids": IDS}, folder / "ids.safetensors")

    def call(model: Path) -> torch.Tensor:
        done = run("eval", model, "--tokens", folder / "ids.safetensors", "--seq-len", IDS.shape[1], "--logits",
                   folder / "logits.safetensors", "--arithmetic", "float", "--quiet")
        assert done.returncode == 0, done.stderr
        return load_file(folder / "logits.safetensors")["logits"]

    return call


def names_of(tensors) -> dict[str, str]:
    """Hugging Face's name -> llama.cpp's."""
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
             "lm_head.weight": "output.weight"}
    for name in tensors:
        if not name.startswith("model.layers."):
            continue
        block, part = name.removeprefix("model.layers.").split(".", 1)
        module, kind = part.rsplit(".", 1)
        theirs = NAMES.get(module, {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}.get(module))
        names[name] = f"blk.{block}.{theirs}.{kind}"
    return names


def write(folder: Path, source: Path, type_of, metadata: dict | None = None, rope_factors: list | None = None) -> Path:
    """`source` as a GGUF file by the gguf package, `type_of` giving each tensor's type, and beside it `expected`, the
    model with the values that the package reads back."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(VOCAB)])
    writer.add_array("some.numbers", [1, 2, 3])
    for key, value in (metadata or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    expected = {}
    for name, theirs in names_of(tensors).items():
        rows = tensors[name]
        heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else 0
        stored = (permuted(rows, heads) if heads else rows).numpy()
        kind = type_of(theirs) if stored.ndim == 2 else TYPES["F32"]
        blocks = gguf.quants.quantize(stored, kind)
        writer.add_tensor(theirs, blocks, raw_dtype=kind)
        values = torch.from_numpy(gguf.quants.dequantize(blocks, kind).reshape(rows.shape).astype(np.float32))
        if heads:  # the other way round
            values = values.reshape(heads, rows.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)
        expected[name] = values.contiguous()
    if rope_factors:
        writer.add_tensor("rope_freqs.weight", np.array(rope_factors, np.float32))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    (folder / "expected").mkdir()
    save_file(expected, folder / "expected" / "model.safetensors", {"format": "pt"})
    (folder / "expected" / "config.json").write_text(json.dumps(config))
    return folder / "model.gguf"


@pytest.mark.parametrize("name", TYPES)
def test_files_of_the_gguf_package_have_the_logits_of_their_values(model, logits_of_file, tmp_path, name):
    file = write(tmp_path / "out", model, lambda theirs: TYPES[name])
    got = logits_of_file(file)
    assert relative_error(got, loaded_logits(tmp_path / "out" / "expected", IDS.long())) < 1e-5


def test_types_may_differ_between_tensors(run, model, logits_of_file, export, tmp_path):
    kinds = {"attn_q": "Q4_0", "attn_v": "Q8_0", "ffn_down": "Q4_1", "token_embd": "Q8_0", "output": "Q4_0"}
    file = write(tmp_path / "out", model, lambda name: TYPES[kinds.get(name.split(".")[-2], "F16")])
    got = logits_of_file(file)
    assert relative_error(got, loaded_logits(tmp_path / "out" / "expected", IDS.long())) < 1e-5
    export(file, "hf", tmp_path / "hf", "--dtype", "float32")
    assert relative_error(loaded_logits(tmp_path / "hf", IDS.long()), got) < 1e-5
    export(file, "compressed-tensors", tmp_path / "mixed", "--dtype", "float32")
    assert relative_error(logits_of_file(tmp_path / "mixed"), got) < 1e-5


@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q4_0", "Q4_1"])
def test_an_export_has_the_logits_of_what_was_exported(exported, logits_of_file, name):
    native, _, file = exported(name)
    # Q4_1 rounds the minimum of a block to float16.
    bound = 2e-3 if name in ("Q4_1", "F16") else 1e-5
    assert relative_error(logits_of_file(file), logits_of_file(native)) < bound


@pytest.mark.parametrize("name", ["F16", "Q4_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_come_back_as_themselves(run, logits_of_file, export, tmp_path, family, name):
    exported_family(run, tmp_path, family, name)
    got = logits_of_file(tmp_path / "model.gguf")
    assert relative_error(got, logits_of_file(tmp_path / "native")) < (2e-3 if name == "F16" else 1e-5)
    export(tmp_path / "model.gguf", "hf", tmp_path / "hf", "--dtype", "float32")
    assert relative_error(loaded_logits(tmp_path / "hf", IDS.long()), got) < 1e-5
    if family == "llama3":
        scaling = json.loads((tmp_path / "hf" / "config.json").read_text())["rope_scaling"]
        assert scaling == FAMILIES[family][1]["rope_scaling"]


def test_rope_factors_of_no_known_rule_are_refused(run, model, windows, tmp_path):
    file = write(tmp_path / "out", model, lambda name: TYPES["F16"], rope_factors=[1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0])
    done = run("eval", file, "--tokens", windows, "--seq-len", 16)
    assert done.returncode == 1 and "rope_freqs.weight" in done.stderr, done.stderr


def test_codes_of_a_file_are_exported_again(exported, export, tmp_path):
    _, _, file = exported("Q4_0")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(file, alone / "first.gguf")
    export(alone / "first.gguf", "compressed-tensors", tmp_path / "ct", "--dtype", "float16")
    quantization = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert quantization["config_groups"]["group_0"]["weights"]["group_size"] == 32
    assert {path.name for path in (tmp_path / "ct").iterdir()} == {"README.md", "config.json", "model.safetensors"}


def test_inspect_names_the_format_and_the_share_of_each_type(exported, run, tmp_path):
    file = exported("Q8_0")[2]
    done = run("inspect", file, "--json", tmp_path / "inspect.json")
    assert done.returncode == 0, done.stderr
    sizes = {}
    for tensor in gguf.GGUFReader(file).tensors:
        sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
    shares = [f"{name} {100 * size / sum(sizes.values()):.1f} %" for size, name in
              sorted(((size, name) for name, size in sizes.items()), reverse=True)]
    assert "  format        gguf: " + ", ".join(shares) + "\n" in done.stdout
    assert "8 bits, symmetric, per group of 32" in done.stdout
    assert json.loads((tmp_path / "inspect.json").read_text())["bytes_by_type"] == sizes


@pytest.mark.parametrize("metadata, named", [
    ({"llama.rope.scaling.type": "yarn"}, "rope scaling"), ({"llama.expert_count": 8}, "experts"),
    ({"llama.vocab_size": 1}, None),
])
def test_metadata_that_is_not_executed_is_refused(run, model, windows, tmp_path, metadata, named):
    file = write(tmp_path / "out", model, lambda name: TYPES["F16"], metadata)
    done = run("eval", file, "--tokens", windows, "--seq-len", 16)
    assert (done.returncode == 0) if named is None else (done.returncode == 1 and named in done.stderr), done.stderr


def test_files_that_are_cut_off_are_refused(exported, run, windows, tmp_path):
    content = exported("Q8_0")[2].read_bytes()
    for size in (0, 3, 20, 500, len(content) // 2, len(content) - 64):
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        done = run("eval", tmp_path / "cut.gguf", "--tokens", windows, "--seq-len", 16)
        assert done.returncode == 1 and "cut.gguf" in done.stderr, (size, done.stderr)
        assert len(done.stderr.strip().splitlines()) == 1


def test_the_metadata_hold_the_tokenizer(exported, run, tmp_path):
    native, _, file = exported("Q8_0")
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "data" / "wikitext2-test.txt").read_text(encoding="utf-8")[:20000] + "<|im_end|> 2024 ünï")
    reports = []
    for arguments in ([native], [file], [file, "--tokenizer", native / "tokenizer.json"]):
        done = run("eval", *arguments, "--text", text, "--seq-len", 64, "--json", tmp_path / "report.json", "--quiet")
        assert done.returncode == 0, done.stderr
        reports.append(json.loads((tmp_path / "report.json").read_text()))
    assert len({report["num_tokens"] for report in reports}) == 1
    assert all(report["perplexity"] == pytest.approx(reports[0]["perplexity"], rel=1e-5) for report in reports)


def test_a_token_in_front_of_a_text_is_that_of_the_metadata(run, tmp_path):
    seed = ROOT / "tests" / "fuzz" / "seeds" / "gguf" / "tiny.gguf"  # tokens a, b, ab, <s>; add_bos_token
    (tmp_path / "text.txt").write_text("abbaab")
    done = run("eval", seed, "--text", tmp_path / "text.txt", "--seq-len", 5, "--logits", tmp_path / "logits.safetensors")
    assert done.returncode == 0, done.stderr
    assert load_file(tmp_path / "logits.safetensors")["input_ids"].tolist() == [[3, 2, 1, 0, 2]]
