"""What users are told to load with trust_remote_code holds only our code, whatever the source holds."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_runs import ROOT, RTN, TINY

TOKENIZER = ROOT / "tests" / "data" / "tokenizer" / "tokenizer.json"
CLASSES = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class Config(LlamaConfig): pass
class Model(LlamaForCausalLM): config_class = Config
class Tokenizer(PreTrainedTokenizerFast): pass
def generate(*arguments, model, **options): return model.lm_head.weight
"""
LOAD = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__name__, model.generate(tokenizer("12", return_tensors="pt").input_ids, max_new_tokens=2).shape)
"""


@pytest.fixture
def hostile(tmp_path) -> Path:
    """The tiny model with every place that makes transformers run code of a folder."""
    model = tmp_path / "hostile"
    shutil.copytree(TINY, model)
    shutil.copy(TOKENIZER, model)
    code = f"open({str(tmp_path / 'executed')!r}, 'w').close()\n" + CLASSES
    (model / "evil.py").write_text(code)
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(code)
    (model / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}}))
    (model / "preprocessor_config.json").write_text(json.dumps({"auto_map": {"AutoImageProcessor": "evil.Processor"}}))
    (model / "optimizer.pt").write_bytes(pickle.dumps(1))
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config["custom_pipelines"] = {"text-generation": {"impl": "evil.Model", "pt": ["AutoModelForCausalLM"]}}
    (model / "config.json").write_text(json.dumps(config))
    return model


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(RTN))
    return path


def load(folder: Path, tmp_path: Path) -> str:
    """Loads the folder in a process of its own, so that no earlier import hides one."""
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, check=False,
                          timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_code_of_the_source_runs(run, hostile, recipe, tmp_path):
    executed = tmp_path / "executed"
    out, dense = tmp_path / "out", tmp_path / "dense"
    done = run("quantize", hostile, "--recipe", recipe, "--output", out, "--dry-run", "--quiet")
    for part in ("evil.py", "optimizer.pt", "custom_generate", "tokenizer_config.json: auto_map", "config.json: auto_map",
                 "config.json: custom_pipelines", "preprocessor_config.json: auto_map"):
        assert part in done.stderr, part
    warning = done.stderr
    done = run("quantize", hostile, "--recipe", recipe, "--output", out, "--quiet")
    assert (done.returncode, done.stderr) == (0, warning)
    done = run("export", out, "--format", "hf", "--output", dense)
    assert (done.returncode, "not copied" in done.stderr) == (0, False), "what baseq wrote is ours"
    assert "auto_map" not in json.loads((dense / "config.json").read_text())
    done = run("export", hostile, "--format", "hf", "--output", tmp_path / "dense2")
    assert done.returncode == 0 and "evil.py" in done.stderr
    for folder in (out, dense, tmp_path / "dense2"):
        assert {path.name for path in folder.glob("**/*.py")} <= {"modeling_baseq.py"}
        for path in folder.glob("*.json"):
            assert "evil" not in path.read_text(), path
    assert "BaseqForCausalLM torch.Size([1," in load(out, tmp_path)
    assert not executed.exists()
    # The source itself does run it: the test would notice.
    load(hostile, tmp_path)
    assert executed.exists()


@pytest.mark.parametrize("auto_map", ["evil.Model", ["evil.Model"], None, 7])
def test_an_auto_map_of_any_kind_ends_no_run(run, recipe, tmp_path, auto_map):
    shutil.copytree(TINY, tmp_path / "model")
    config = json.loads((TINY / "config.json").read_text()) | {"auto_map": auto_map}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    done = run("quantize", tmp_path / "model", "--recipe", recipe, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert written == {"AutoModelForCausalLM": "modeling_baseq.BaseqForCausalLM"}
