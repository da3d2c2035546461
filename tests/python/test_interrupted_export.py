"""An export that is killed leaves nothing that looks complete, and the next one cleans up; one that is asked to stop
cleans up itself."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import GRID, TINY, digests

from tiny_runs import ROUND, recipe_of

KILLS = 8
TOKENIZER = Path(__file__).resolve().parents[1] / "data" / "tokenizer" / "tokenizer.json"


@pytest.fixture(scope="module")
def native(round_off, tmp_path_factory) -> Path:
    """With an embedding that takes a while to write."""
    folder = tmp_path_factory.mktemp("interrupted")
    source = folder / "source"
    shutil.copytree(TINY, source)
    shutil.copy(TOKENIZER, source)  # which a GGUF file holds
    embedding = {"model.embed_tokens.weight": torch.randn(200000, 64, generator=torch.Generator().manual_seed(0))}
    save_file(load_file(source / "model.safetensors") | embedding, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": 200000}))
    round_off(recipe_of(ROUND, weights=GRID | {"scale_dtype": "float16"}), folder / "native", model=source)
    return folder / "native"


@pytest.mark.parametrize("name", ["hf", "gptq"])
def test_a_killed_export_leaves_no_directory_that_looks_complete(binary, native, export, tmp_path, name):
    start = time.monotonic()
    export(native, name, tmp_path / "whole", "--shard-size", "8")
    seconds = time.monotonic() - start
    whole = digests(tmp_path / "whole")
    out, generator, killed = tmp_path / "out", random.Random(0), 0
    for _ in range(KILLS):
        command = [binary, "export", str(native), "--format", name, "--output", str(out), "--shard-size", "8", "--quiet",
                   "--force"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        time.sleep(generator.uniform(0.2, 0.95) * seconds)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if out.exists():  # it was faster
            assert digests(out) == whole
            shutil.rmtree(out)
        assert {path.name for path in tmp_path.iterdir() if path.is_dir()} <= {"whole", "out.partial"}
    assert killed > 0
    export(native, name, out, "--shard-size", "8")
    assert digests(out) == whole
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"whole", "out"}


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda sent: sent.name)
@pytest.mark.parametrize("name", ["hf", "gguf"])
def test_an_export_that_is_asked_to_stop_leaves_nothing_behind(binary, native, tmp_path, name, sent):
    command = [binary, "export", str(native), "--format", name, "--output", str(tmp_path / "out"), "--quiet"]
    process = subprocess.Popen(command + (["--gguf-type", "F16"] if name == "gguf" else []), stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None and not any(tmp_path.iterdir()):
        time.sleep(0.001)
    process.send_signal(sent)
    message = process.communicate()[1]
    assert process.returncode == 130, message
    assert "stopped" in message
    assert not any(tmp_path.iterdir())
