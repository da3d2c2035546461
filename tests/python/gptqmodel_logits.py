"""python gptqmodel_logits.py MODEL IN.safetensors OUT.safetensors: logits of a GPTQ or AWQ checkpoint by GPTQModel, in an
environment of its own because it needs another transformers. IN holds input_ids, OUT gets float32 logits."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch  # noqa: E402
from gptqmodel import BACKEND, GPTQModel  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

model, ids, output = sys.argv[1:]
method = json.loads((Path(model) / "config.json").read_text())["quantization_config"]["quant_method"]
backend = BACKEND.TORCH if method == "gptq" else BACKEND.TORCH_AWQ
loaded = GPTQModel.load(model, device="cpu", backend=backend, dtype=torch.float16)
with torch.no_grad():
    logits = loaded.model(load_file(ids)["input_ids"].long()).logits
save_file({"logits": logits.float().contiguous()}, output)
