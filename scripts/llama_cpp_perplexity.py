#!/usr/bin/env python3
"""Perplexity that llama.cpp (as cyllama brings it) computes of windows of token ids:

    python scripts/llama_cpp_perplexity.py FILE.gguf TOKENS.safetensors [WINDOWS]

As `baseq eval` defines it: exp of the mean over all windows of -log p(token | the tokens of the window before it)."""

import math
import sys

import numpy as np
from cyllama.llama import llama_cpp as llama
from gguf import GGUFReader
from safetensors.numpy import load_file


def main() -> None:
    path, tokens, *limit = sys.argv[1:]
    windows = load_file(tokens)["input_ids"][: int(limit[0]) if limit else None]
    vocab = int(next(t for t in GGUFReader(path).tensors if t.name == "token_embd.weight").shape[1])
    # The wrapper asks the model's class for the number of logits.
    model = type("Model", (llama.LlamaModel,), {"n_vocab": vocab})(path, llama.LlamaModelParams(), False)
    parameters = llama.LlamaContextParams()
    parameters.n_ctx = parameters.n_batch = windows.shape[1]
    total, count = 0.0, 0
    for window in windows.tolist():
        context = llama.LlamaContext(model, parameters, False)
        batch = llama.LlamaBatch(n_tokens=len(window), embd=0, n_seq_max=1)
        batch.set_batch(window, 0, True)
        context.decode(batch)
        for i, token in enumerate(window[1:]):
            logits = np.array(context.get_logits_ith(i), np.float64)
            total += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[token]
            count += 1
    print(f"perplexity {math.exp(total / count):.4f} over {count} tokens")


if __name__ == "__main__":
    main()
