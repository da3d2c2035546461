"""Recipes that quantize the tiny model in a moment, and the log of such a run."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "data" / "tiny_llama_base"
POINTS = {"step": "points", "at": ["*"]}
ROUND = {"step": "round"}
GPTQ = {"step": "round", "method": "gptq"}


def config_file(name: str) -> Path:
    """The file of a built-in recipe."""
    (path,) = (ROOT / "configs").glob(f"*/{name}.json")
    return path


def hadamard(*at: str) -> dict:
    return {"step": "transform", "kind": "hadamard", "at": list(at)}


def recipe_of(*steps: dict, weights: dict | None = None, inputs: dict | None = None, cache: dict | None = None,
              head: dict | None = None, embedding: dict | None = None, overrides: list | None = None,
              **keys) -> dict:
    """A recipe of these steps, with the grids that are given; `inputs` is input_activations, `cache` is kv_cache."""
    grids = {"weights": weights, "input_activations": inputs, "kv_cache": cache, "head": head, "embedding": embedding,
             "overrides": overrides}
    return keys | {"grids": {name: grid for name, grid in grids.items() if grid is not None}, "steps": list(steps)}


def steps_of(recipe: dict) -> list[tuple[str, dict]]:
    """Every step with its path for --set."""
    passes = [("", recipe)] if "steps" in recipe else [
        (f"passes.{i}.", one) for i, one in enumerate(recipe.get("passes", []))]
    return [(f"{path}steps.{i}", step) for path, one in passes for i, step in enumerate(one["steps"])]


RTN = recipe_of(ROUND, weights={"num_bits": 4}, name="rtn")
LEARNED = recipe_of(
    hadamard("residual"),
    {"step": "transform", "kind": "scale", "at": ["value", "o", "down"]},
    {"step": "transform", "kind": "matrix", "at": ["value"]},
    hadamard("down"),
    {"step": "points", "at": ["o", "down"], "clip": 0.9, "shift": "mean"},
    {"step": "learn", "name": "transforms", "weights": "straight_through", "epochs": 2, "final_rate": 3e-5,
     "rates": {"value.matrix": 3e-3, "*.scale": 3e-3, "*.clip": 3e-2, "*.shift": 2e-3}},
    {"step": "points", "at": ["qkv", "gate_up"], "clip": 0.9},
    {"step": "points", "at": ["k_cache", "v_cache"], "clip": 0.95},
    GPTQ,
    {"step": "learn", "name": "activations", "epochs": 3, "final_rate": 3e-6,
     "rates": {"*.clip": 3e-2, "*.shift": 2e-3, "*.gain": 3e-3}},
    weights={"num_bits": 4}, inputs={"num_bits": 4}, cache={"num_bits": 4}, name="learned")


def events_of(path: Path) -> list[dict]:
    lines = path.read_text().splitlines()
    assert path.read_bytes().endswith(b"\n")
    return [json.loads(line) for line in lines]
