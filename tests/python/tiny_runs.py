"""Recipes that quantize the tiny model in a moment, and the log of such a run."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "data" / "tiny_llama_base"
RTN = {"name": "rtn", "weights": {"num_bits": 4}, "rounding": {"method": "rtn"}}
LEARNED = {"name": "learned", "weights": {"num_bits": 4}, "rounding": {"method": "gptq"},
           "input_activations": {"num_bits": 4, "symmetric": False, "clip": 0.9, "shift": "mean"},
           "kv_cache": {"num_bits": 4, "symmetric": False, "clip": 0.95},
           "transforms": {"residual": "hadamard", "down": "hadamard"},
           "learn_transforms": {"epochs": 2}, "learn_activations": {"epochs": 3}}


def events_of(path: Path) -> list[dict]:
    lines = path.read_text().splitlines()
    assert path.read_bytes().endswith(b"\n")
    return [json.loads(line) for line in lines]
