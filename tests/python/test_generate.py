"""`baseq generate` and `baseq bench` from outside."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

from tiny_runs import POINTS, ROUND, TINY, recipe_of

ROOT = Path(__file__).resolve().parents[2]
CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


@pytest.fixture
def generate(run, model_with_tokenizer, tmp_path):
    """generate(*arguments) -> stdout and the report that --json writes; asserts success."""
    report = tmp_path / "report.json"

    def call(*arguments, model: Path = model_with_tokenizer, variables: dict | None = None) -> tuple[str, dict]:
        done = run("generate", model, *arguments, "--json", report, "--quiet", variables=variables)
        assert done.returncode == 0, done.stderr
        assert report.read_text().startswith('{\n  "baseq": '), "by which the program knows what it may replace"
        return done.stdout, json.loads(report.read_text())

    return call


def greedy_ids(model: Path, prompt: list[int], count: int) -> list[int]:
    """What transformers continues a prompt with."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return out[0, len(prompt):].tolist()


def test_the_most_probable_tokens_are_those_of_transformers(generate, model_with_tokenizer):
    text, report = generate("The quantizer rounds", "--max-tokens", 24, "--temperature", 0)
    assert text == report["text"] + "\n"
    assert report["finish_reason"] == "length" and len(report["ids"]) == 24
    assert report["ids"] == greedy_ids(model_with_tokenizer, report["prompt_ids"], 24)


def test_a_quantized_model_says_the_same_with_any_number_of_threads(generate, round_off, model_with_tokenizer, tmp_path):
    four = {"num_bits": 4}
    round_off(recipe_of(POINTS, ROUND, weights=four, inputs=four, cache=four), tmp_path / "out", model_with_tokenizer)
    sampling = ("the Block", "--max-tokens", 16, "--temperature", 2, "--seed", 5, "--logprobs", 2)
    first, report = generate(*sampling, "--threads", 1, model=tmp_path / "out")
    second, other = generate(*sampling, "--threads", 2, model=tmp_path / "out")
    assert first == second and report["logprobs"] == other["logprobs"]
    assert [entry["id"] for entry in report["logprobs"]] == report["ids"]
    assert all(len(entry["top"]) == 2 for entry in report["logprobs"])


def test_a_line_is_a_turn_of_a_conversation(binary, model_with_tokenizer, tmp_path):
    (model_with_tokenizer / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    report = tmp_path / "report.json"
    done = subprocess.run([binary, "generate", model_with_tokenizer, "--chat", "--system", "Be brief.", "--max-tokens", "4",
                           "--context", "200", "--json", report, "--quiet"],
                          input="Hello\n\nand <|im_end|>?\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(report.read_text())["turns"]
    assert done.stdout == first["text"] + "\n" + second["text"] + "\n"
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(model_with_tokenizer / "tokenizer.json"), chat_template=CHATML)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert first["prompt_ids"] == list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    assert second["prompt_ids"][:len(first["prompt_ids"])] == first["prompt_ids"]
    ends = second["prompt_ids"].count(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert ends == 4, "of system, user, assistant, user; what a user writes is text"


def test_what_cannot_work_is_said_before_the_model_is_read(run, model_with_tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    weights = model_with_tokenizer / "model.safetensors"
    weights.write_bytes(weights.read_bytes())

    def error(*arguments) -> str:
        done = run("generate", model_with_tokenizer, *arguments)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    assert error("") == "error: the prompt is empty\n"
    assert error("--file", tmp_path / "empty.txt") == "error: the prompt is empty\n"
    assert "give a PROMPT, --file or --chat" in error()
    assert "a longer --context or a shorter prompt is needed" in error("word " * 80)
    assert "the prompt has 80 tokens, but the context is 16 tokens" in error("1" * 80, "--context", "16")
    assert "has no chat template" in error("--chat", "Hello")
    (model_with_tokenizer / "chat_template.jinja").write_text("{{ '<|turn|>' + messages[0]['content'] }}")
    assert "none that is known: it has <|turn|>" in error("--chat", "Hello")
    assert "--system needs --chat" in run("generate", model_with_tokenizer, "Hello", "--system", "x").stderr.replace("requires", "needs")
    config = {"do_sample": True, "top_p": 7}
    (model_with_tokenizer / "generation_config.json").write_text(json.dumps(config))
    assert "generation_config.json: top_p: expected a number from 0 to 1, got 7" in error("Hello")


def test_sampling_starts_from_the_checkpoints_own_values(generate, model_with_tokenizer):
    config = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "eos_token_id": [1, 2]}
    (model_with_tokenizer / "generation_config.json").write_text(json.dumps(config))
    _, report = generate("Hello", "--max-tokens", 3, "--top-k", 5, "--seed", 9)
    assert report["sampling"] == {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0, "repetition_penalty": 1, "seed": 9}


def test_ctrl_c_ends_the_answer(binary, model_with_tokenizer, tmp_path):
    command = [binary, "generate", model_with_tokenizer, "Hello", "--max-tokens", "1000000", "--context", "1000100",
               "--temperature", "3", "--json", tmp_path / "report.json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    rest.decode("utf-8", errors="strict" if not rest else "ignore")
    assert b"interrupted" in errors and not (tmp_path / "report.json").exists()


def test_bench_measures_what_was_asked_for(run, tmp_path):
    done = run("bench", TINY, "--depth", 1, 20, "--batch", 2, "--num-tokens", 2, "--json", tmp_path / "speed.json", "--quiet")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "speed.json").read_text()
    assert text.startswith('{\n  "baseq": '), "by which the program knows what it may replace"
    speed = json.loads(text)
    assert [(row["depth"], row["batch"]) for row in speed["measurements"]] == [(1, 2), (20, 2)]
    for row in speed["measurements"]:
        assert min(row[key] for key in ("prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes")) > 0
    assert speed["read_bytes_per_second"] > 1e8
    refused = run("bench", TINY, "--depth", 1 << 20, "--batch", 4096)
    assert refused.returncode == 1 and "of memory are free" in refused.stderr


@pytest.mark.slow
def test_a_real_model_continues_as_transformers_does(generate):
    source = Path(os.environ.get("BASEQ_SMOLLM2", ROOT / "runs" / "SmolLM2-135M-Instruct"))
    assert source.is_dir(), f"{source} is missing; scripts/smollm2_checkpoint.py makes it"
    words = (ROOT / "data" / "wikitext2-test.txt").read_text().split()
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for i in range(20):
        prompt = " ".join(words[500 * i:500 * i + 10 + 3 * i])
        _, report = generate(prompt, "--max-tokens", 64, "--temperature", 0, model=source)
        ids = torch.tensor([report["prompt_ids"]])
        with torch.no_grad():
            expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
        assert report["ids"] == expected[0, ids.shape[1]:].tolist(), prompt
