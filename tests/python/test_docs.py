"""README.md and docs/ are followed to the letter on a small model: commands, C++ and Python.

A block of commands of baseq alone is run. Any other names, in the text next to it, the day on which it was measured or
run by hand, or the script or test that runs it.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from test_cli import COMMANDS
from test_completions import options_of
from test_generate import CHATML
from tiny_runs import ROOT, TINY

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What stands next to a block that is not run here.
DAY = re.compile(r"\b(Measured|Run)( by hand)? on 20\d\d-\d\d-\d\d\b")
RUNNER = re.compile(r"\b[Rr]un by `((?:scripts|tests|\.ci)/[\w./]+)`")
# Words that a reader replaces.
PLACEHOLDERS = {"RECIPE": "quarot-w4a4kv4", "CALIBRATION": "data/smollm2-calibration-16x512.safetensors"}
# What a page takes for granted besides MODEL: files by their kind.
GIVEN = {
    "calibration.md": {"wiki.txt": "text", "chat.jsonl": "chat", "code.jsonl": "chat"},
    "cluster.md": {"text.txt": "text"},
    "commands.md": {"OTHER": "quantized"},
    "export.md": {"LOW-RANK": "low rank", "tokens.safetensors": "ids", "llmc-w4a16-rtn": "quantized", "llmc-w8a8-rtn": "quantized",
                  "llmc-w4a16-gptq": "quantized", "ours-w4a16-vllm": "quantized", "ours-w8a8-vllm": "quantized"},
    "reports.md": {"original": "model", "OUT": "quantized", "OUT-A": "quantized", "OUT-B": "quantized",
                   "OUT-eval.json": "results", "original-eval.json": "results"},
}
# Names that an example in C++ takes for granted.
ASSUMED = {
    "conv.md": """
        const at::Tensor x8 = at::randint(-8, 8, {1, 3, 12, 12}, at::kChar), weight8 = at::randint(-8, 8, {4, 3, 3, 3}, at::kChar);
        const at::Tensor x = at::randn({1, 3, 12, 12}), weight = at::randn({4, 3, 3, 3}), bias = at::randn({4});
        const at::Tensor audio = at::randn({1, 3, 40}), taps = at::randn({4, 3, 3}), calibration = at::randn({2, 3, 12, 12});
        """,
    "library.md": "const at::Tensor all_ids = at::randint(600, {4096}, at::kLong);",
}
# Few short windows, whatever the recipe asks for; the rest of a command is as it stands on the page.
PROGRAM = """#!/bin/bash
case "$1 $*" in
  *--resume*) ;;
  "quantize "*) set -- "$@" --set calibration.num_samples=8 --set calibration.seq_len=32 ;;
  "bench "*) set -- "$@" --repetitions 1 ;;
esac
exec {binary} "$@"
"""


@dataclass
class Block:
    page: Path
    line: int
    text: str
    around: str  # the paragraphs before and after it

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    def is_of_baseq(self) -> bool:
        lines = self.text.replace("\\\n", " ").splitlines()
        return all(line.startswith(("baseq ", "build/baseq ", "#")) for line in lines)


def blocks_of(page: Path, language: str) -> list[Block]:
    text, found = page.read_text(), []
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        before, after = text[:match.start()].strip(), text[match.end():].strip()
        around = before.split("\n\n")[-1] + "\n" + after.split("\n\n")[0]
        found.append(Block(page, text.count("\n", 0, match.start()) + 1, match[1], around))
    return found


def blocks(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks_of(page, language)]


@pytest.mark.parametrize("block", [block for block in blocks("bash") if not block.is_of_baseq()], ids=str)
def test_commands_that_are_not_run_here_say_who_ran_them(block):
    runners = RUNNER.findall(block.around)
    assert runners or DAY.search(block.around), (
        f"{block}: not run here; say 'Measured on DATE', 'Run on DATE' or 'Run by `scripts/...`' next to it")
    for runner in runners:
        assert (ROOT / runner).exists(), f"{block}: there is no {runner}"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, run) -> dict[str, Path]:
    """A model of two blocks whose sizes have groups of 64, with tokenizer and chat template; a file of each other kind."""
    folder = tmp_path_factory.mktemp("docs")
    names = {"model": "model", "text": "text.txt", "chat": "chat.jsonl", "ids": "ids.safetensors", "results": "results.json",
             "quantized": "quantized", "low rank": "low_rank"}
    shelf = {kind: folder / name for kind, name in names.items()}
    shape = ["--layers", "2", "--hidden", "64", "--intermediate", "128", "--heads", "2", "--vocab", "640"]
    subprocess.run([sys.executable, ROOT / "scripts" / "synthetic_checkpoint.py", shelf["model"], *shape], check=True, capture_output=True)
    (shelf["model"] / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML, "eos_token": "<|im_end|>"}))
    text = (ROOT / "data" / "wikitext2-test.txt").read_text()[:8_000]
    shelf["text"].write_text(text)
    turns = [{"role": role, "content": text[:400]} for role in ("user", "assistant")]
    shelf["chat"].write_text(json.dumps({"messages": turns}) + "\n")
    save_file({"input_ids": np.random.default_rng(0).integers(0, 600, (16, 512), dtype=np.int32)}, shelf["ids"])
    for kind, recipe in (("quantized", "rtn-w4a16"), ("low rank", "lqer-w3a16-g64-r16")):
        done = run("quantize", shelf["model"], "--recipe", recipe, "--calibration", shelf["ids"], "--output", shelf[kind], "--quiet")
        assert done.returncode == 0, done.stderr
    done = run("eval", shelf["quantized"], "--tokens", shelf["ids"], "--seq-len", 32, "--json", shelf["results"])
    assert done.returncode == 0, done.stderr
    return shelf


@pytest.fixture
def desk(shelf, tmp_path, monkeypatch, binary) -> Path:
    """A folder to work in as the pages do: baseq on the path and in build/, texts, the model under its names."""
    desk = tmp_path / "desk"
    for folder in ("bin", "build", "data", "runs"):
        (desk / folder).mkdir(parents=True)
    for program in ("bin/baseq", "build/baseq"):
        (desk / program).write_text(PROGRAM.format(binary=Path(binary).resolve()))
        (desk / program).chmod(0o755)
    (desk / "examples").symlink_to(ROOT / "examples")
    for path in (ROOT / "data").iterdir():
        (desk / "data" / path.name).symlink_to(shelf["ids" if path.suffix == ".safetensors" else "text"])
    for name in ("MODEL", "SmolLM2-135M-Instruct", "runs/SmolLM2-135M-Instruct"):
        (desk / name).symlink_to(shelf["model"])
    snapshot = tmp_path / "hub" / "models--HuggingFaceTB--SmolLM2-135M-Instruct" / "snapshots" / "0123abc"
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("0123abc")
    shutil.copytree(shelf["model"], snapshot)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PATH", f"{desk}/bin:{os.environ['PATH']}")
    return desk


def follow(block: Block, desk: Path) -> None:
    """Runs the block in bash, and looks for the files that it promises."""
    text = block.text
    for placeholder, value in PLACEHOLDERS.items():
        text = re.sub(rf"\b{placeholder}\b", value, text)
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", text], cwd=desk, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=300, check=False)
    assert done.returncode == 0, f"{block}\n{text}\n{done.stderr[-3000:]}"
    assert done.stdout.strip()
    for promised in re.findall(r"(?:--output|--json|# writes) ([\w./-]+)", text):
        assert (desk / promised).exists(), f"{block}: no {promised}"


@pytest.mark.parametrize("page", [page for page in PAGES if any(map(Block.is_of_baseq, blocks_of(page, "bash")))], ids=lambda page: page.name)
def test_pages_can_be_followed(page, desk, shelf):
    for name, kind in GIVEN.get(page.name, {}).items():
        (shutil.copytree if shelf[kind].is_dir() else shutil.copy)(shelf[kind], desk / name)
    for block in blocks_of(page, "bash"):
        if block.is_of_baseq():
            follow(block, desk)


def program_of(examples: list[Block]) -> str:
    """A program with a function for each example; a checkpoint that an earlier one wrote makes room."""
    functions, includes = [], {f"#include <{header}>" for header in ("ATen/ATen.h", "baseq/baseq.h", "filesystem", "iostream")}
    for number, block in enumerate(examples):
        lines = block.text.splitlines()
        includes |= {line for line in lines if line.startswith("#include")}
        body = "\n".join("" if line in includes else line for line in lines)
        room = 'std::filesystem::remove_all("out");' if '.output = "out"' in body else ""
        functions.append(f'void example_{number}() {{ {room} {ASSUMED.get(block.page.name, "")}\n'
                         f'#line {block.line + 1} "{block.page.name}"\n{body}\n}}')
    calls = " ".join(f"example_{number}();" for number in range(len(examples)))
    return "\n".join([*sorted(includes), *functions, f"int main() {{ {calls} }}\n"])


def test_examples_in_cpp_run(desk, shelf, binary):
    """Compiled and linked with the commands of examples/quantize.cpp, without its optimizations."""
    build = Path(binary).resolve().parent
    (desk / "examples.cpp").write_text(program_of(blocks("cpp")))
    source = str(ROOT / "examples" / "quantize.cpp")
    (compilation,) = [shlex.split(entry["command"]) for entry in json.loads((build / "compile_commands.json").read_text())
                      if entry["file"] == source]
    shown = subprocess.run(["ninja", "-C", build, "-t", "commands", "-s", "examples/quantize_example"], capture_output=True, text=True, check=True)
    (linking,) = re.findall(r"&& (.*) && :", shown.stdout)
    names = {source: desk / "examples.cpp", compilation[compilation.index("-o") + 1]: desk / "examples.o",
             "examples/quantize_example": desk / "all_examples"}
    for command in (compilation, shlex.split(linking.replace("libbaseq.a", "libbaseq_conv.a libbaseq.a", 1))):
        words = [names.get(word, word) for word in command if not re.fullmatch(r"-O\d|-W[a-z-]+", word)]
        done = subprocess.run(words, cwd=build, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    shutil.copy(shelf["text"], desk / "calibration.txt")
    done = subprocess.run([desk / "all_examples"], cwd=desk, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    assert "block 1" in done.stdout


def test_examples_in_python_run(shelf, run, tmp_path):
    import peft
    import transformers

    low_rank = tmp_path / "low rank"
    done = run("export", shelf["low rank"], "--format", "peft", "--output", low_rank)
    assert done.returncode == 0, done.stderr
    names = {"torch": torch, "AutoModelForCausalLM": transformers.AutoModelForCausalLM, "PeftModel": peft.PeftModel,
             "OUT": low_rank, "folder": shelf["quantized"]}
    for block in blocks("python"):
        values = dict(names)
        exec(compile(block.text, str(block), "exec"), values)
        assert values["model"](torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_the_example_is_run(binary, tmp_path):
    program = Path(binary).resolve().parent / "examples" / "quantize_example"
    done = subprocess.run([program, TINY, tmp_path / "out"], capture_output=True, text=True, check=True)
    assert "relative output error 0.0" in done.stdout and (tmp_path / "out" / "config.json").exists()


@pytest.fixture(scope="module")
def options(run) -> dict[str, set[str]]:
    return {command: options_of(run, command) | {"--help"} for command in COMMANDS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_the_text_exist(page, options):
    """`baseq COMMAND --option` between backticks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for span in re.findall(r"(?<!`)`((?:build/|mpirun -n \w+ )?baseq [^`]+)`", text):
        words = shlex.split(span[span.index("baseq "):])
        used = {word.split("=")[0] for word in words[2:] if word.startswith("--")}
        if words[1] in COMMANDS:
            assert used <= options[words[1]], f"{page.name}: {span}"
        else:
            assert words[1] in ("COMMAND", "--version", "completions", "manual"), f"{page.name}: {span}"
