#!/usr/bin/env python3
"""Tasks of lm-eval on a native checkpoint, by the PyTorch model that it holds.

    python examples/lm_eval/evaluate.py CHECKPOINT [TASK ...]

Run from the root of the repository; default task: everyday, beside this file. The program `lm_eval` itself (0.4.13) asks
transformers for a quantizer named "baseq" before it loads a model by name, so the model is loaded here and handed over.
"""

import sys
from pathlib import Path

import torch
import transformers
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table


def main() -> None:
    folder, *tasks = sys.argv[1:]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    model.config.quantization_config = None  # lm-eval would look for that quantizer even now
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    manager = TaskManager(include_path=str(Path(__file__).parent))
    results = simple_evaluate(HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=8),
                              tasks=tasks or ["everyday"], task_manager=manager)
    print(make_table(results))


if __name__ == "__main__":
    main()
