"""`baseq update` replaces the modeling_baseq.py of a native checkpoint and nothing else."""

import json
import shutil
from pathlib import Path

import pytest
from native_checkpoint import make_older

from tiny_runs import RTN, TINY

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "formats" / "native" / "modeling_baseq.py"
OLD = "FORMAT_VERSION = 4\n\n\nclass BaseqForCausalLM:\n    pass\n"


@pytest.fixture
def native(round_off, tmp_path) -> Path:
    """A checkpoint that an earlier version wrote."""
    round_off(RTN, tmp_path / "native")
    (tmp_path / "native" / "modeling_baseq.py").write_text(OLD)
    (tmp_path / "native" / "modeling_mine.py").write_text("mine = 1\n")
    return tmp_path / "native"


def contents(folder: Path) -> dict[str, tuple]:
    """Of each file the bytes, and what would show that it was written again."""
    return {path.name: (path.read_bytes(), path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def edit_config(folder: Path, edit) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("version", [3, 4, 5])
def test_the_file_is_replaced_and_no_other(run, native, version):
    if version < 5:
        make_older(native, version)
    before = contents(native)
    done = run("update", native)
    assert done.returncode == 0, done.stderr
    assert "modeling_baseq.py: replaced by that of baseq " in done.stdout
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("next: ")
    after = contents(native)
    assert (native / "modeling_baseq.py").read_text() == SOURCE.read_text()
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"modeling_baseq.py"}
    again = run("update", native)
    assert again.returncode == 0 and "modeling_baseq.py: up to date" in again.stdout
    assert contents(native) == after


def test_a_link_makes_way_and_what_it_points_to_stays(run, native, tmp_path):
    (native / "modeling_baseq.py").rename(tmp_path / "blob")
    (native / "modeling_baseq.py").symlink_to(tmp_path / "blob")
    assert run("update", native).returncode == 0
    assert not (native / "modeling_baseq.py").is_symlink()
    assert (native / "modeling_baseq.py").read_text() == SOURCE.read_text()
    assert (tmp_path / "blob").read_text() == OLD


def test_a_missing_file_is_written(run, native):
    (native / "modeling_baseq.py").unlink()
    assert run("update", native).returncode == 0
    assert (native / "modeling_baseq.py").read_text() == SOURCE.read_text()


def test_a_config_that_does_not_name_it_is_left_alone_and_warned_of(run, native):
    edit_config(native, lambda config: config.update(auto_map={"AutoConfig": "configuration_mine.Config"}))
    config = (native / "config.json").read_bytes()
    done = run("update", native)
    assert done.returncode == 0 and "replaced" in done.stdout
    assert '"AutoModelForCausalLM": "modeling_baseq.BaseqForCausalLM"' in done.stderr
    assert (native / "config.json").read_bytes() == config


def make_original(folder: Path) -> None:
    shutil.copyfile(TINY / "config.json", folder / "config.json")


def make_foreign(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(quantization_config={"quant_method": "gptq", "bits": 4}))


def make_newer(folder: Path) -> None:
    edit_config(folder, lambda config: config["quantization_config"].update(format_version=99))


def make_mistral(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(architectures=["MistralForCausalLM"]))


def write_another_file(folder: Path) -> None:
    (folder / "modeling_baseq.py").write_text("print('mine')\n")


@pytest.mark.parametrize("change, message", [
    (make_original, "is no checkpoint that baseq quantized"),
    (make_foreign, "is no checkpoint that baseq quantized"),
    (make_newer, "format_version 99"),
    (make_mistral, "is a MistralForCausalLM; modeling_baseq.py runs LlamaForCausalLM only"),
    (write_another_file, "is not what baseq writes"),
])
def test_what_is_not_ours_is_refused(run, native, change, message):
    change(native)
    before = contents(native)
    done = run("update", native)
    assert done.returncode == 1 and done.stdout == ""
    assert message in done.stderr
    assert contents(native) == before
