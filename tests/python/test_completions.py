"""Completions and man pages, which the program makes from its own options."""

import re
import shutil
import subprocess
import warnings

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


def need(shell: str) -> None:
    if shutil.which(shell) is None:
        warnings.warn(f"NOT TESTED: completions of {shell}, which is not installed")
        pytest.skip(f"{shell} is not installed")


# A subcommand, an option, a recipe and a choice: what is typed, and what Tab makes of it.
TYPED = {"baseq quan": "baseq quantize", "baseq quantize --rec": "baseq quantize --recipe",
         "baseq quantize --recipe baseq-plus": "baseq quantize --recipe baseq-plus-w4a4kv4", "baseq export m --format gp": "baseq export m --format gptq"}
# Types each line in an interactive zsh and presses Tab; the file gets what then stands there.
ZSH = r"""
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell "autoload -Uz compinit; $1"
zpty -w shell "press-tab() { zle complete-word; print -r -- \$BUFFER >>$2; zle kill-whole-line }; zle -N press-tab; bindkey '^X' press-tab"
for line in "${@:3}"; do zpty -w -n shell "$line"$'\x18'; done
repeat 600; do
  zpty -r -t shell shown
  [[ -e $2 ]] && (( $(wc -l <$2) >= ARGC - 2 )) && break
  sleep 0.1
done
zpty -d shell
"""


@pytest.mark.parametrize("found", ["in a folder", "sourced"])
def test_zsh_completes(run, tmp_path, found):
    need("zsh")
    (tmp_path / "_baseq").write_text(run("completions", "zsh").stdout)
    setup = f"fpath=({tmp_path} $fpath); compinit -D" if found == "in a folder" else f"compinit -D; source {tmp_path}/_baseq"
    subprocess.run(["zsh", "-f", "-c", ZSH, "zsh", setup, tmp_path / "lines", *TYPED], check=True, capture_output=True, timeout=120)
    assert [line.rstrip() for line in (tmp_path / "lines").read_text().splitlines()] == list(TYPED.values())


def test_fish_completes(run, tmp_path):
    need("fish")
    (tmp_path / "baseq.fish").write_text(run("completions", "fish").stdout)
    for line, completed in TYPED.items():
        done = subprocess.run(["fish", "--no-config", "-c", f"source baseq.fish; complete --do-complete '{line}'"], cwd=tmp_path, check=True,
                              capture_output=True, text=True, timeout=120)
        assert done.stdout.split("\t")[0] == completed.split()[-1] and done.stdout.count("\n") == 1 and done.stderr == ""


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
    for folder in ("site-functions", "vendor-completions"):
        assert (tmp_path / "zsh" / folder / "_baseq").read_text() == run("completions", "zsh").stdout
    assert (tmp_path / "fish" / "vendor_completions.d" / "baseq.fish").read_text() == run("completions", "fish").stdout
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
