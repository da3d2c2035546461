"""Calibration files as people have them: several with weights, conversations, documents."""

import json

import pytest

from tiny_runs import GPTQ, recipe_of

CHAT = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


@pytest.fixture
def chat_model(model_with_tokenizer):
    (model_with_tokenizer / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT}))
    return model_with_tokenizer


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"Line {i * i} of a text about quantization.\n" for i in range(60)))
    (tmp_path / "b:2").write_text("".join(f"Another text with {i * 7} lines.\n" for i in range(60)))
    lines = [{"messages": [{"role": "user", "content": f"What is {i} times {i}?"}, {"role": "assistant", "content": str(i * i)}]}
             for i in range(40)]
    lines[3]["messages"][1]["role"] = "tool"
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


@pytest.fixture
def calibrated(run, chat_model, files):
    """calibrated(output, *options) -> the process, and what --json says of calibration files."""
    recipe = files / "recipe.json"
    recipe.write_text(json.dumps(recipe_of(GPTQ, weights={"num_bits": 4}, calibration={"num_samples": 6, "seq_len": 24})))

    def call(output: str, *options):
        done = run("quantize", chat_model, "--recipe", recipe, "--output", files / output, "--json", files / "report.json", *options)
        assert done.returncode == 0, done.stderr
        return done, json.loads((files / "report.json").read_text())["calibration"]

    return call


def weights_of(folder):
    return (folder / "model.safetensors").read_bytes()


def test_files_are_mixed_by_weight_and_what_was_read_is_said(calibrated, files):
    mixed = ["--calibration", files / "a.txt:3", "--calibration", files / "b:2", "--calibration", f"{files / 'chat.jsonl'}:2"]
    done, read = calibrated("out", *mixed)
    assert [one["windows"] for one in read] == [3, 1, 2]
    assert [one["documents"] for one in read] == [1, 1, 40]
    assert all(one["tokens"] >= 24 for one in read)
    for one in read:
        assert f"{one['file']}: {one['tokenized']} of {one['documents']} documents, {one['tokens']} tokens" in done.stderr
    _, again = calibrated("again", *mixed)
    assert again == read
    assert weights_of(files / "again") == weights_of(files / "out")
    calibrated("other", *mixed, "--seed", 1)
    assert weights_of(files / "other") != weights_of(files / "out")


def test_a_weight_alone_changes_nothing(calibrated, files):
    calibrated("plain", "--calibration", files / "a.txt")
    calibrated("weighed", "--calibration", f"{files / 'a.txt'}:0.5", "--calibration-split", "random")
    assert weights_of(files / "weighed") == weights_of(files / "plain")


@pytest.mark.parametrize("split", ["packed", "samples"])
def test_conversations_without_a_place_are_counted(calibrated, files, split):
    done, (read,) = calibrated("out", "--calibration", files / "chat.jsonl", "--calibration-split", split, "--seed", 4)
    assert read["windows"] == 6 and read["tokenized"] <= 40
    assert ("skipped, the first: " in done.stderr) == (read["skipped"] > 0)


def test_what_is_wrong_with_calibration_files_is_said(run, chat_model, files):
    recipe = files / "recipe.json"
    recipe.write_text(json.dumps(recipe_of(GPTQ, weights={"num_bits": 4}, calibration={"num_samples": 2, "seq_len": 24})))
    (files / "bad.jsonl").write_text('{"text": "fine"}\n{"prompt": "x"}\n')
    (files / "data.parquet").write_bytes(b"PAR1")
    for options, said in [
        (["--calibration", f"{files / 'a.txt'}:0"], "a weight is a positive number"),
        (["--calibration", f"{files / 'none.txt'}:2"], "none.txt"),
        (["--calibration-split", "packed"], "--calibration"),
        (["--calibration", files / "a.txt", "--calibration-split", "sorted"], "packed"),
        (["--calibration", files / "bad.jsonl"], 'bad.jsonl: line 2: expected an object with a string "text" or a list "messages"'),
        (["--calibration", files / "data.parquet"], "pandas.read_parquet"),
        (["--calibration", files / "a.txt", "--calibration", f"{files / 'b:2'}:900"], "gives it none of the 2 windows"),
    ]:
        done = run("quantize", chat_model, "--recipe", recipe, "--output", files / "out", *options)
        assert done.returncode != 0 and said in done.stderr, (options, done.stderr)
        assert not (files / "out").exists()
