"""Completions and man pages, which the program makes from its own options."""

import re
import shutil
import subprocess

import pytest

from test_cli import COMMANDS
from tiny_runs import ROOT


def options_of(run, command: str) -> set[str]:
    return set(re.findall(r"^  (--[a-z-]+)", run(command, "--help").stdout, re.MULTILINE))


@pytest.fixture(scope="module")
def complete(run, tmp_path_factory):
    """complete(words...) -> what bash offers for the last word, in a folder with the file model.txt."""
    folder = tmp_path_factory.mktemp("bash")
    (folder / "model.txt").touch()
    script = run("completions", "bash")
    assert script.returncode == 0, script.stderr

    def call(*words: str) -> set[str]:
        quoted = " ".join(f"'{word}'" for word in words)
        program = f"{script.stdout}\nCOMP_WORDS=(baseq {quoted}); COMP_CWORD={len(words)}; _baseq\nprintf '%s\\n' \"${{COMPREPLY[@]}}\""
        done = subprocess.run(["bash", "-u", "-c", program], cwd=folder, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return set(done.stdout.split())

    return call


def test_bash_offers_what_is_possible(complete, run):
    assert complete("") == {*COMMANDS, "--help", "--version"}
    assert complete("quant") == {"quantize"}
    assert complete("quantize", "--") == options_of(run, "quantize") | {"--help"}
    assert complete("quantize", "--recipe", "baseq-plus") == {"baseq-plus-w4a4kv4"}
    assert complete("quantize", "--activations", "") == {"ram", "disk"}
    assert complete("export", "m", "--format", "g") == {"gptq", "gguf"}
    assert complete("quantize", "mod") == complete("eval", "m", "--text", "mod") == {"model.txt"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_name_every_option(run, shell, tmp_path):
    script = run("completions", shell).stdout
    for command in COMMANDS:
        for option in options_of(run, command):
            assert (f"-l {option[2:]} " if shell == "fish" else option) in script
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([shell, "-n", tmp_path / "script"], check=True)


def test_man_pages_are_whole(run, tmp_path):
    done = run("manual", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pages = tmp_path / "man" / "man1"
    assert {page.name for page in pages.iterdir()} == {"baseq.1", *(f"baseq-{command}.1" for command in COMMANDS)}
    assert (tmp_path / "bash-completion" / "completions" / "baseq").read_text() == run("completions", "bash").stdout
    for command in COMMANDS:
        text = (pages / f"baseq-{command}.1").read_text().replace("\\-", "-")
        assert options_of(run, command) <= set(re.findall(r"--[a-z-]+", text))
    if shutil.which("groff") is None:
        pytest.skip("NOT TESTED how man pages look: there is no groff")
    for page in pages.iterdir():
        done = subprocess.run(["groff", "-man", "-Tutf8", "-ww", page], capture_output=True, text=True, check=True)
        assert done.stderr == "", page.name


def test_hidden_commands_stay_hidden(run):
    shown = run("--help").stdout
    assert "completions" not in shown and "manual" not in shown
    assert "baseq completions bash" in (ROOT / "docs" / "install.md").read_text()
