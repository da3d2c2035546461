#!/usr/bin/env python3
"""Perplexity that vLLM computes of windows of token ids, as JSON (vLLM itself writes to stdout).

    python scripts/vllm_perplexity.py CHECKPOINT TOKENS.safetensors OUTPUT.json

As `baseq eval` defines it: exp of the mean over all windows of -log p(token | the tokens of the window before it). Run by
scripts/prove_vllm.sh, which sets the environment that vLLM needs on a CPU.
"""

import json
import math
import sys
from pathlib import Path

from safetensors.numpy import load_file
from vllm import LLM, SamplingParams


def main() -> None:
    model, tokens, output_path = sys.argv[1:]
    windows = load_file(tokens)["input_ids"].tolist()
    length = len(windows[0])
    engine = LLM(model, dtype="bfloat16", enforce_eager=True, max_model_len=length + 1, max_num_seqs=1,
                 enable_prefix_caching=False, skip_tokenizer_init=True)
    # Each window's own tokens are the prompt; vLLM wants to generate at least one more.
    options = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    prompts = [{"prompt_token_ids": window} for window in windows]
    total, count = 0.0, 0
    for window, output in zip(windows, engine.generate(prompts, options, use_tqdm=False), strict=True):
        for token, known in zip(window[1:], output.prompt_logprobs[1:], strict=True):
            total -= known[token].logprob
            count += 1
    Path(output_path).write_text(json.dumps({"perplexity": math.exp(total / count), "num_tokens": count}))


if __name__ == "__main__":
    main()
